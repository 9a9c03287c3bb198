// The page gives a node that has shown a video a widget for it, and sends that widget's value, an empty text, as one more input. To ComfyUI the
// node has changed then, and it and everything behind it run again though nothing was touched. A picture is no input: it stays here.
import { app } from '../../scripts/app.js'

const PREVIEW = 'video-preview'

app.registerExtension({
  name: 'DecAF.previews',
  // A node that takes a video is expected to show one. This one shows a picture of it.
  nodeCreated(node) {
    if (node.comfyClass === 'DecAFSaveCutOut') node.previewMediaType = 'image'
    // In a box nobody asks this node what it shows: it says so itself.
    if (node.comfyClass === 'DecAFShowObjects') {
      const told = node.onExecuted
      node.onExecuted = function (output) {
        this.previewMediaType = output?.animated?.[0] ? 'video' : 'image'
        return told?.apply(this, arguments)
      }
    }
  },
  setup() {
    const make = app.graphToPrompt
    app.graphToPrompt = async function (...given) {
      const made = await make.apply(this, given)
      for (const node of Object.values(made?.output ?? {}))
        if (node.class_type?.startsWith('DecAF')) delete node.inputs?.[PREVIEW]
      return made
    }
  },
})
