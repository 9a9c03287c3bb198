/** Whether a node's definition is of this pack, whatever the folder is called that it is installed in. */
export function isOurs(definition) {
  return definition?.category?.startsWith('DecAF') ?? false
}
