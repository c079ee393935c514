"""What is wrong with a subject that was refused.  Derivation: specs/diagnosis.md."""
