"""What the programs share: parser, start-up, torchrun."""
