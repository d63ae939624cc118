"""Pictures in, an immutable captioned dataset version out. Imports nothing of the other rooms."""
