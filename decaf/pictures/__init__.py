"""What people look at: heat maps, overlays, the contact sheet."""
