"""The first half of the paper: questions, attention rollout, object-background and video-frame fusion, and points."""
