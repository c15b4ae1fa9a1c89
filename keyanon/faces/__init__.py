"""Pictures of faces: where they come from, where the face is, whose it is."""
