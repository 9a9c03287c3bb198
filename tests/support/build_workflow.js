// Builds a workflow in ComfyUI's page from its description in workflow_specs.py. Nodes stand in columns, one group each; a link that passes a
// column is led over it. LiteGraph's node position is below the node's title bar.
async ({ workflow, boxes }) => {
  const { app, LiteGraph } = window
  const TITLE = 30, GAP = 40, PAD = 24, LANE = 22
  app.graph.clear()

  function slot(slots, name, of) {
    const place = slots.findIndex(one => one.name === name || one.label === name)
    if (place < 0) throw new Error(`${of} has no ${name}, only ${slots.map(one => one.name)}`)
    return place
  }

  function made(wanted) {
    const node = boxes[wanted.type] ? box(wanted.type, boxes[wanted.type]) : LiteGraph.createNode(wanted.type)
    if (!node) throw new Error('no node type ' + wanted.type)
    if (!node.graph) app.graph.add(node)
    for (const [name, value] of Object.entries(wanted.widgets)) {
      const widget = node.widgets.find(widget => widget.name === name)
      if (!widget) throw new Error(`${wanted.type} has no widget ${name}`)
      widget.value = value
      widget.callback?.(value)
    }
    if (wanted.models.length) node.properties.models = wanted.models
    const least = node.computeSize()
    node.setSize([Math.max(least[0], wanted.size[0]), Math.max(least[1], wanted.size[1])])
    return node
  }

  // Boxes are made first: they take all that is in the graph with them.
  function columns(spec, left) {
    const nodes = {}, bounds = {}, groups = []
    let x = left
    for (const column of Object.values(spec.columns))
      for (const [key, wanted] of Object.entries(column)) if (boxes[wanted.type]) nodes[key] = made(wanted)
    for (const [title, column] of Object.entries(spec.columns)) {
      let y = PAD + TITLE
      const inside = []
      for (const [key, wanted] of Object.entries(column)) {
        const node = (nodes[key] ??= made(wanted))
        y += wanted.gap
        node.pos = [x, y + TITLE]
        y += TITLE + node.size[1] + GAP
        inside.push([key, node])
      }
      const width = Math.max(...inside.map(([, node]) => node.size[0]))
      for (const [key, node] of inside) {
        node.setSize([width, node.size[1]])
        bounds[key] = { left: x, right: x + width, column: groups.length }
      }
      const group = new LiteGraph.LGraphGroup(title)
      group.pos = [x - PAD, TITLE - PAD]
      group.size = [width + 2 * PAD, y - GAP + 2 * PAD - TITLE]
      app.graph.add(group)
      groups.push(group)
      x += width + GAP + 2 * PAD
    }
    const lanes = {}
    for (const text of spec.links) {
      const [[from, output], [to, input]] = text.split(' > ').map(end => end.split('.'))
      const source = slot(nodes[from].outputs, output, from), target = slot(nodes[to].inputs, input, to)
      const link = nodes[from].connect(source, nodes[to], target)
      if (!link) throw new Error('cannot link ' + text)
      if (bounds[to].column - bounds[from].column < 2) continue
      const lane = (lanes[`${from}.${output}`] ??= Object.keys(lanes).length)
      const y = TITLE - PAD - LANE * (lane + 1)
      app.graph.createReroute([bounds[from].right + PAD + GAP / 2, y], link)
      app.graph.createReroute([bounds[to].left - PAD - GAP / 2, y], link)
    }
    return { nodes, groups, right: x }
  }

  function box(title, spec) {
    const { nodes, groups, right } = columns(spec, 0)
    const types = Object.fromEntries(Object.entries(nodes).map(([key, node]) => [key, node.type]))
    const { subgraph, node } = app.graph.convertToSubgraph(new Set([...Object.values(nodes), ...groups]))
    const inner = key => {
      const found = subgraph.nodes.filter(node => node.type === types[key])
      if (found.length !== 1) throw new Error(`${found.length} nodes ${types[key]} in ${title}`)
      return found[0]
    }
    subgraph.name = node.title = title
    subgraph.description = spec.description
    for (const [name, targets] of Object.entries(spec.inputs)) {
      let input = null
      for (const [key, into] of targets.split(', ').map(end => end.split('.'))) {
        const target = inner(key).inputs[slot(inner(key).inputs, into, key)]
        input ??= subgraph.addInput(name, String(target.type))
        if (!input.connect(target, inner(key))) throw new Error(`cannot lead ${name} to ${key}.${into}`)
      }
      if (spec.labels[name]) subgraph.renameInput(input, spec.labels[name])
    }
    for (const [name, from] of Object.entries(spec.outputs)) {
      const [key, out] = from.split('.')
      const source = inner(key).outputs[slot(inner(key).outputs, out, key)]
      const output = subgraph.addOutput(name, String(source.type))
      if (!output.connect(source, inner(key))) throw new Error(`cannot lead ${from} out`)
      if (spec.labels[name]) subgraph.renameOutput(output, spec.labels[name])
    }
    const tops = Math.min(...subgraph.nodes.map(one => one.pos[1]))
    const lefts = Math.min(...subgraph.nodes.map(one => one.pos[0])), rights = Math.max(...subgraph.nodes.map(one => one.pos[0] + one.size[0]))
    subgraph.inputNode.pos = [lefts - 260, tops]
    subgraph.outputNode.pos = [rights + 120, tops]
    node.setSize(spec.size)
    return node
  }

  if (!workflow) {
    const [title] = Object.keys(boxes)
    box(title, boxes[title]).pos = [0, TITLE]
    return
  }
  const { nodes } = columns(workflow, 420 + GAP + PAD)
  const note = LiteGraph.createNode('MarkdownNote')
  app.graph.add(note)
  note.title = 'Read me'
  note.widgets[0].value = workflow.note
  note.pos = [0, TITLE]
  note.setSize([420, 640])
  return Object.keys(nodes).length
}
