// Correct Objects shows the frame that is marked, and a click on it is a point. The points stay in the node's own two texts, as pixels of the
// clip: a workflow looks as if they had been typed, and typed ones are marks here.
import { app } from '../../scripts/app.js'

const KIND = 'DecAFCorrectObjects'
const TEXTS = { positive: 'positive_points', negative: 'negative_points' }
const FIRST = 'Run once, then click on what belongs to the object; shift-click what does not.'
const WIDTH = 440
const HEIGHT = 320

const STYLE = `
.decaf-points { display: flex; flex-direction: column; gap: 6px; box-sizing: border-box; min-height: ${HEIGHT}px; overflow: hidden;
  font: 12px/1.35 system-ui, sans-serif; color: var(--input-text, #ddd); user-select: none; }
.decaf-points > * { flex: none; margin: 0; }
.decaf-points .stage { flex: 1 1 0; min-height: 0; container-type: size; display: flex; align-items: center; justify-content: center;
  border-radius: 6px; background: var(--comfy-input-bg, #222); }
.decaf-points .picture { position: relative; aspect-ratio: var(--ratio); width: min(100cqw, 100cqh * var(--ratio)); cursor: crosshair; }
.decaf-points .picture.another { cursor: not-allowed; }
.decaf-points .picture.another img { opacity: 0.35; }
.decaf-points img { display: block; width: 100%; height: 100%; border-radius: 4px; pointer-events: none; }
.decaf-points .first { max-width: 34ch; padding: 0 12px; text-align: center; font-size: 14px; }
.decaf-points .mark { position: absolute; width: 20px; height: 20px; margin: -10px; padding: 0; border: 0; background: none; cursor: pointer; }
.decaf-points .mark svg { display: block; width: 100%; height: 100%; overflow: visible; }
.decaf-points .mark:hover svg { scale: 1.25; }
.decaf-points .bar { display: flex; align-items: center; gap: 8px; height: 24px; }
.decaf-points .bar input { flex: 1; min-width: 0; accent-color: #3fae5a; }
.decaf-points .bar output { min-width: 9ch; font-variant-numeric: tabular-nums; }
.decaf-points .bar button { padding: 2px 10px; border: 1px solid var(--border-color, #555); border-radius: 5px; font: inherit; color: inherit;
  background: var(--comfy-input-bg, #222); cursor: pointer; margin-left: auto; }
.decaf-points .bar :disabled { opacity: 0.45; cursor: default; }
.decaf-points [hidden] { display: none !important; }
[data-testid^="node-body-"]:has(.decaf-points) > img, [data-testid^="node-body-"]:has(.decaf-points) > img + div { display: none; }`

// Apart by shape as by colour, and with a dark casing on whatever lies behind.
const ARMS = { positive: 'M10 4V16M4 10H16', negative: 'M4 10H16' }
const COLOURS = { positive: '#4be36f', negative: '#ff5a52' }
const glyph = (sign) => `<svg viewBox="0 0 20 20" stroke-linecap="round" fill="none">
  ${sign === 'negative' ? '<rect x="1" y="5" width="18" height="10" rx="5" fill="#0e0e12" fill-opacity="0.75"/>' : ''}
  <path d="${ARMS[sign]}" stroke="#0e0e12" stroke-width="7"/><path d="${ARMS[sign]}" stroke="${COLOURS[sign]}" stroke-width="3"/></svg>`

function make(tag, given, ...inner) {
  const element = Object.assign(document.createElement(tag), given)
  element.append(...inner)
  return element
}

/** The points of a text, [] of an empty one, null of one that holds none. */
function read(text) {
  if (!String(text ?? '').trim()) return []
  try {
    const points = JSON.parse(text).map(({ x, y }) => ({ x: Number(x), y: Number(y) }))
    return points.every(({ x, y }) => Number.isFinite(x) && Number.isFinite(y)) ? points : null
  } catch {
    return null
  }
}

const written = (points) => (points.length ? `[${points.map(({ x, y }) => `{"x": ${x}, "y": ${y}}`).join(', ')}]` : '')
const within = (value, most) => Math.min(Math.max(value, 0), most)

class Editor {
  constructor(node) {
    this.node = node
    this.picture = null // what the server tells of it: file, frame, frames, width and height of the clip
    this.image = make('img', { alt: '', draggable: false, onerror: () => this.show(null) })
    this.marks = make('div', {})
    this.frame = make('div', { className: 'picture' }, this.image, this.marks)
    this.first = make('p', { className: 'first', textContent: FIRST })
    this.slider = make('input', { type: 'range', min: 0, step: 1, ariaLabel: 'frame' })
    this.slider.addEventListener('input', () => this.set('frame', Number(this.slider.value)))
    this.number = make('output', {})
    this.clear = make('button', { type: 'button', textContent: 'clear', title: 'Remove all marks', onclick: () => this.empty() })
    this.said = make('p', { className: 'said' })
    this.element = make(
      'div',
      { className: 'decaf-points' },
      make('div', { className: 'stage' }, this.frame, this.first),
      make('div', { className: 'bar' }, this.number, this.slider, this.clear),
      this.said,
    )
    this.frame.addEventListener('pointerdown', (event) => this.clicked(event))
    // The page's menu of the node would come up, and its Delete key would take the whole node.
    this.element.addEventListener('contextmenu', (event) => (event.preventDefault(), event.stopPropagation()))
    this.element.addEventListener('keydown', (event) => event.stopPropagation())
    // On the classic canvas this lies above the canvas, which is to be zoomed and moved from here as well.
    const classic = () => !window.LiteGraph?.vueNodesMode && app.canvas
    this.element.addEventListener('wheel', (event) => classic() && app.canvas.processMouseWheel(event))
    for (const [name, handle] of [['pointerdown', 'processMouseDown'], ['pointermove', 'processMouseMove'], ['pointerup', 'processMouseUp']])
      this.element.addEventListener(name, (event) => classic() && (event.button === 1 || event.buttons & 4) && app.canvas[handle](event))
  }

  widget(name) {
    return this.node.widgets?.find((widget) => widget.name === name)
  }

  wired(name) {
    return this.node.inputs?.find((input) => input.widget?.name === name)?.link != null
  }

  points(sign) {
    return this.wired(TEXTS[sign]) ? [] : read(this.widget(TEXTS[sign])?.value)
  }

  set(name, value) {
    const widget = this.widget(name)
    widget.value = value
    widget.callback?.(value, app.canvas, this.node)
    this.node.graph?.setDirtyCanvas?.(true, true)
    this.draw()
  }

  /** Whether the picture is of the frame that the marks are for. */
  current() {
    return this.picture && (this.wired('frame') || this.picture.frame === this.widget('frame')?.value)
  }

  clicked(event) {
    if (event.button !== 0 && event.button !== 2) return
    event.stopPropagation()
    const mark = event.target.closest('.mark')
    if (mark) return this.remove(mark.dataset.sign, Number(mark.dataset.place))
    if (!this.current()) return
    const sign = event.button === 2 || event.shiftKey || event.ctrlKey ? 'negative' : 'positive'
    const points = this.points(sign)
    if (this.wired(TEXTS[sign]) || !points) return
    // As it lies on the screen, whatever the canvas and the screen are scaled by.
    const { left, top, width, height } = this.frame.getBoundingClientRect()
    const x = within(Math.floor(((event.clientX - left) / width) * this.picture.width), this.picture.width - 1)
    const y = within(Math.floor(((event.clientY - top) / height) * this.picture.height), this.picture.height - 1)
    this.set(TEXTS[sign], written([...points, { x, y }]))
  }

  remove(sign, place) {
    this.set(TEXTS[sign], written(this.points(sign).filter((_, index) => index !== place)))
  }

  empty() {
    for (const name of Object.values(TEXTS)) if (!this.wired(name)) this.set(name, '')
  }

  show(picture) {
    this.picture = picture ?? null
    if (picture) {
      const { filename, subfolder, type, width, height } = picture
      this.image.src = app.api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`)
      this.frame.style.setProperty('--ratio', width / height)
    }
    this.draw()
  }

  draw() {
    const { picture } = this
    this.frame.hidden = this.slider.hidden = !picture
    this.first.hidden = Boolean(picture)
    this.frame.classList.toggle('another', !this.current())
    const frame = this.wired('frame') ? picture?.frame : this.widget('frame')?.value
    this.number.textContent = this.wired('frame') && !picture ? 'frame' : `frame ${frame}`
    this.slider.disabled = this.wired('frame')
    this.slider.max = (picture?.frames ?? 1) - 1
    this.slider.value = frame ?? 0
    const marksOf = (sign) => (this.points(sign) ?? []).map((point, place) => this.mark(sign, point, place))
    this.marks.replaceChildren(...(picture ? Object.keys(TEXTS).flatMap(marksOf) : []))
    this.clear.disabled = Object.values(TEXTS).every((name) => this.wired(name) || !this.widget(name)?.value)
    this.said.textContent = this.words(frame)
    this.said.hidden = !this.said.textContent
  }

  mark(sign, { x, y }, place) {
    const mark = make('button', { type: 'button', className: 'mark', innerHTML: glyph(sign), title: `${x}, ${y}: click to remove` })
    Object.assign(mark.dataset, { sign, place })
    mark.style.left = `${within((x + 0.5) / this.picture.width, 1) * 100}%`
    mark.style.top = `${within((y + 0.5) / this.picture.height, 1) * 100}%`
    mark.addEventListener('keydown', (event) => ['Enter', ' ', 'Delete', 'Backspace'].includes(event.key) && this.remove(sign, place))
    return mark
  }

  words(frame) {
    const names = Object.values(TEXTS)
    const wired = names.filter((name) => this.wired(name))
    const wrong = names.filter((name) => !this.wired(name) && !read(this.widget(name)?.value))
    const said = []
    if (wired.length) said.push(`${wired.join(' and ')} ${wired.length > 1 ? 'come' : 'comes'} from another node: nothing is written there.`)
    if (wrong.length) said.push(`${wrong.join(' and ')}: these are no points. Clear them, or write them as [{"x": 120, "y": 80}].`)
    if (!this.picture || wired.length > 1) return said.join(' ')
    if (this.current()) said.push('Click: belongs to the object. Shift- or right-click: does not. Click on a mark: removes it.')
    else if (frame >= this.picture.frames) said.push(`There is no frame ${frame}: the clip has frames 0 to ${this.picture.frames - 1}.`)
    else {
      const marked = names.some((name) => this.widget(name)?.value)
      said.push(`This is frame ${this.picture.frame}; the picture of frame ${frame} comes with the next Run.`)
      if (marked) said.push(`The marks then count for frame ${frame}: clear them first, or mark it in a second Correct Objects.`)
    }
    return said.join(' ')
  }
}

/** After another method of the node, or where it has none. */
function after(target, name, then) {
  const told = target[name]
  target[name] = function () {
    const answer = told?.apply(this, arguments)
    then.apply(this, arguments)
    return answer
  }
}

/** What the node has shown last, also before the workflow was left and opened again. */
function lastOf(node) {
  const graph = node.graph
  const id = !graph || graph === (app.rootGraph ?? app.graph) ? String(node.id) : `${graph.id}:${node.id}`
  return app.nodeOutputs?.[id]?.decaf_points?.at(-1)
}

app.registerExtension({
  name: 'DecAF.points',
  setup() {
    document.head.append(make('style', { textContent: STYLE }))
  },
  nodeCreated(node) {
    if (node.comfyClass !== KIND) return
    const editor = (node.decafPoints = new Editor(node))
    const widget = node.addDOMWidget('points_editor', 'decaf_points', editor.element, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => HEIGHT + 20,
    })
    widget.serialize = false
    for (const name of ['frame', ...Object.values(TEXTS)]) {
      const own = editor.widget(name)
      if (own) after(own, 'callback', () => editor.draw())
    }
    after(node, 'onExecuted', (output) => output?.decaf_points && editor.show(output.decaf_points.at(-1)))
    after(node, 'onConnectionsChange', () => setTimeout(() => editor.draw()))
    after(node, 'onConfigure', () => editor.draw())
    // The page keeps the last picture of the work under the editor, as a second one of another kind: not on the classic canvas, and not in
    // Nodes 2.0, see the last line of STYLE.
    node.onDrawBackground = () => {}
    // A saved workflow brings a size of its own after this.
    const [width, height] = node.computeSize()
    node.setSize([Math.max(width, WIDTH), height])
    editor.draw()
  },
  loadedGraphNode(node) {
    if (!node.decafPoints) return
    // The page puts back what nodes have shown only after it has loaded them all.
    setTimeout(() => !node.decafPoints.picture && node.decafPoints.show(lastOf(node)), 300)
  },
})
