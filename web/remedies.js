// The page tells of a mistake that some node took no input. What was wrong and what helps is in the server's answer; here it comes in sight, once.
import { app } from '../../scripts/app.js'
import { isOurs } from './ours.js'

const SECONDS = 15

function show(title, text) {
  app.extensionManager?.toast?.add({ severity: 'error', summary: title, detail: text, life: SECONDS * 1000 })
}

function definitionOf(type) {
  return window.LiteGraph?.registered_node_types?.[type]?.nodeData
}

/** Of the nodes that the server has refused: one message a mistake. */
function showRefused(refused) {
  for (const node of Object.values(refused ?? {})) {
    const definition = definitionOf(node.class_type)
    if (!isOurs(definition)) continue
    const said = new Set(node.errors.map((error) => sentence(error)))
    show(definition.display_name, [...said].join('\n'))
  }
}

/** ComfyUI writes "input - what is wrong"; where it is its own error, the message comes before the details. */
function sentence(error) {
  if (error.type === 'custom_validation_failed') return error.details.replace(/^[\w ]+ - /, '')
  return [error.message, error.details].filter(Boolean).join(': ')
}

app.registerExtension({
  name: 'DecAF.remedies',
  setup() {
    const queue = app.api.queuePrompt
    app.api.queuePrompt = async function (...given) {
      try {
        const answer = await queue.apply(this, given)
        showRefused(answer?.node_errors)
        return answer
      } catch (error) {
        showRefused(error?.response?.node_errors)
        throw error
      }
    }
    app.api.addEventListener('execution_error', ({ detail }) => {
      if (detail.exception_type?.endsWith('DecafError')) 
        show(definitionOf(detail.node_type)?.display_name ?? detail.node_type, detail.exception_message.trim())
    })
  },
})
