"""SourceNet, TargetNet, the pose encoder and CAA: build, load, save."""
