"""How well it does: the field's metrics, and the method on made-up scenes."""
