"""What can be said of recorded requests and steps, as pure functions of frames: no page, no figure."""
