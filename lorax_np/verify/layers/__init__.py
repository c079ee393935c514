"""The layer written anew, to be judged with: as replaceable steps, as roundings, and as whole numbers."""
