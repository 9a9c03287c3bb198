"""How well the method works: the field's metrics, and figures on made-up scenes."""
