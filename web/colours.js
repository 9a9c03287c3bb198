// Colours by role: what is a model, what is attention, what is a prompt, what is an object that was found, what finishes a
// clip. The page gives all types that it does not know one colour.
import { app } from '../../scripts/app.js'

// Middle tones, each apart from the others in lightness too: they are seen on a dark and on a light canvas.
const LINKS = {
  DECAF_MLLM: '#b58cf0',
  DECAF_SAM2: '#8c7ae6',
  DECAF_ATTENTION: '#d9822b',
  DECAF_FUSED_ATTENTION: '#f0a53a',
  DECAF_PROMPTS: '#2fb7c9',
  DECAF_TRACKS: '#3fae5a',
}

// Title and body. The page's light themes lighten them by themselves.
const MODEL = ['#352f44', '#3e374f']
const ATTENTION = ['#41342a', '#4c3d30']
const PROMPTS = ['#243d44', '#2b4850']
const TRACKS = ['#273d2e', '#2e4836']
const FINISH = ['#3f2a3a', '#4a3244']
const CLIP = ['#2b3340', '#333d4c']

const NODES = {
  LoadMLLM: MODEL,
  DecAFLoadSAM2: MODEL,
  ExtractRolloutAttention: ATTENTION,
  ObjectBackgroundFusion: ATTENTION,
  FrameFusion: ATTENTION,
  DecAFAttentionPreview: ATTENTION,
  AttentionToSAM2Prompts: PROMPTS,
  SAM2VideoPropagate: TRACKS,
  DecAFShowObjects: TRACKS,
  DecAFCorrectObjects: TRACKS,
  DecAFTracksToMask: TRACKS,
  DecAFPickTracks: TRACKS,
  DecAFRefineMask: FINISH,
  DecAFApplyMask: FINISH,
  DecAFSaveCutOut: FINISH,
  DecAFSampleClip: CLIP,
  DecAFFrameOfVideo: CLIP,
  DecAFPickQuery: ATTENTION,
}

function colourLinks() {
  for (const [type, colour] of Object.entries(LINKS)) {
    if (window.LGraphCanvas) window.LGraphCanvas.link_type_colors[type] = colour
    if (app.canvas) app.canvas.default_connection_color_byType[type] = colour
    document.documentElement.style.setProperty(`--color-datatype-${type}`, colour)
  }
  app.canvas?.setDirty(true, true)
}

// A theme takes the colours of types away that it does not know. It sets a style of the page when it has done so.
function keepColoured() {
  const missing = () => document.documentElement.style.getPropertyValue('--color-datatype-DECAF_MLLM') !== LINKS.DECAF_MLLM
  new MutationObserver(() => missing() && colourLinks()).observe(document.documentElement, { attributes: true, attributeFilter: ['style'] })
}

app.registerExtension({
  name: 'DecAF.colours',
  setup() {
    colourLinks()
    keepColoured()
  },
  // Before the values of a saved workflow: a colour that somebody has chosen comes after this one.
  nodeCreated(node) {
    const colours = NODES[node.comfyClass]
    if (colours) [node.color, node.bgcolor] = colours
  },
})
