"""Pictures of results: heat maps, overlays, the contact sheet."""
