"""The two truths: small layers in fixed-point arithmetic, larger ones by complex steps."""
