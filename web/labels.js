// The page puts an input's display name above its translation. Here the translation is shown, and a name that the user gave is left alone.
import { app } from '../../scripts/app.js'
import { isOurs } from './ours.js'

const specs = (node) => ({ ...node.constructor.nodeData?.input?.required, ...node.constructor.nodeData?.input?.optional })

function showTranslation(node) {
  if (!isOurs(node.constructor.nodeData)) return
  for (const input of node.inputs ?? []) {
    const shown = specs(node)[input.name]?.[1]?.display_name
    const translated = input.localized_name && input.localized_name !== input.name
    if (shown && translated && input.label === shown) input.label = undefined
  }
}

app.registerExtension({ name: 'DecAF.labels', nodeCreated: showTranslation, loadedGraphNode: showTranslation })
