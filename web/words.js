// What a node has to say stays on it when it is done, in place of the step that it was at; a node that has nothing to say loses that line. A
// box (subgraph) shows the words of the node that is at work in it.
import { app } from '../../scripts/app.js'
import { isOurs } from './ours.js'

const LINE = '$$node-text-preview'

/** The node of an id that the server uses: "5", or "3:7" for node 7 in box 3. */
function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph
  let node = null
  for (const part of String(id).split(':')) {
    node = graph?.getNodeById(Number(part)) ?? graph?.getNodeById(part)
    graph = node?.subgraph
  }
  return node
}

function definitionOf(id) {
  return nodeOf(id)?.constructor?.nodeData
}

function write(id, text) {
  app.api.dispatchCustomEvent('progress_text', { nodeId: String(id), text })
}

function clear(node) {
  const line = node?.widgets?.find((widget) => widget.name === LINE)
  if (line) node.removeWidget ? node.removeWidget(line) : node.widgets.splice(node.widgets.indexOf(line), 1)
  node?.setDirtyCanvas?.(true, true)
}

app.registerExtension({
  name: 'DecAF.words',
  setup() {
    let running = null
    const said = new Set()
    const ofBox = new Map() // id of a box: what a node in it has said last
    const boxOf = (id) => id.split(':').slice(0, -1).join(':')
    const ended = () => {
      if (running === null || said.has(running) || !isOurs(definitionOf(running))) return
      clear(nodeOf(running))
      const box = boxOf(running)
      if (!box) return
      if (ofBox.has(box)) write(box, ofBox.get(box))
      else clear(nodeOf(box))
    }
    const api = app.api
    api.addEventListener('execution_start', () => {
      said.clear()
      ofBox.clear()
    })
    api.addEventListener('executing', ({ detail }) => {
      if (String(detail) === running) return
      ended()
      running = detail == null ? null : String(detail)
    })
    api.addEventListener('executed', ({ detail }) => {
      const id = String(detail.node)
      const text = detail.output?.text
      if (!Array.isArray(text) || !isOurs(definitionOf(id))) return
      if (text.length) {
        const words = text.join('\n').replaceAll('\n', '  \n') // the page reads it as Markdown
        said.add(id)
        ofBox.set(boxOf(id), words)
        write(id, words)
      }
    })
    // Of a node in a box, the box.
    api.addEventListener('progress_text', ({ detail }) => {
      const box = boxOf(String(detail.nodeId))
      if (box && isOurs(definitionOf(detail.nodeId))) write(box, detail.text)
    })
  },
})
