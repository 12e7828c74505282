"""How series are drawn: MaskGIT's steps, series by their index, completion, which class each gets."""
