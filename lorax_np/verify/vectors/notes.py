"""What the flags of the golden vectors mean, and the conventions behind their numbers."""


def _note(kind: str, description: str, effect: str = "", compare: str = "") -> dict[str, str]:
    note = {"bugType": kind, "description": description}
    return note | ({"effect": effect} if effect else {}) | ({"compare": compare} if compare else {})


_ANY = "a scale, mask, transposition or missing term shows in the tensor that it is wrong in"
NOTES = {
    "ExactLattice": _note(
        "FUNCTIONAL",
        "data on which every partial sum, in any order, is a float32 number",
        _ANY,
        "bitwise; zeros of either sign are equal",
    ),
    "Generic": _note(
        "FUNCTIONAL, PRECISION",
        "normal data with sizes, constants and magnitudes that are pairwise different",
        _ANY + "; so does an intermediate of too few bits",
        "|got - truth| <= 8 sigma, entry by entry, sigma being the tensor of the profile",
    ),
    "EightBits": _note(
        "PRECISION",
        "inputs of 8 significant bits, exact in bfloat16 and float16",
        "the truth is of these inputs",
    ),
    "RankTail": _note(
        "SHAPE", "r is no multiple of 4", "a kernel's last tile of the rank is dropped or read past"
    ),
    "RankOne": _note("SHAPE", "r = 1", "a squeezed axis; alpha/r, alpha and alpha/sqrt(r) are equal here"),
    "RankGtMin": _note("SHAPE", "r is larger than d_in or d_out", "the rank is clipped to them"),
    "Square": _note("SHAPE", "W, A or B is square", "a transposition or a norm along the wrong axis runs"),
    "MagnitudeZero": _note("DORA", "an entry of m is 0", "gm as gk*k/m is not a number"),
    "MagnitudeNegative": _note("DORA", "an entry of m is below 0", "its modulus is taken"),
    "OneOutput": _note("SHAPE", "d_out = 1", "a squeezed or transposed axis"),
    "OneToken": _note("SHAPE", "one row of x", "a squeezed axis; a mean over tokens looks like a sum"),
    "NoTokens": _note("SHAPE", "zero rows of x", "NaN, a crash, or gradients that are not 0"),
    "LeadingAxes": _note("SHAPE", "x has two or more leading axes", "only the first item of a batch is used"),
    "Dropout": _note(
        "DROPOUT",
        "a mask of 0 and 1/(1-p) on the input of A alone",
        "the mask on the base path, unscaled, drawn anew in backward, or missing in one gradient",
    ),
    "RsLora": _note("SCALE", "s = alpha/sqrt(r)", "alpha/r"),
    "TrainedBias": _note("BIAS", "the base bias is trained", "gb is missing, or a mean over tokens"),
    "LoraBias": _note("BIAS", "B has a bias bB, inside the scaling", "bB is not scaled, or forgotten"),
    "DoraDetached": _note("DORA", "the norm counts as a constant in backward", "its gradient is added"),
    "DoraFullNorm": _note("DORA", "the gradient runs through the norm", "the norm is held constant"),
    "DoraUndroppedBase": _note(
        "CONVENTION", "k*(x W' + s xd A'B') + b: dropout on the adapter alone (mlx-lm, axolotl)"
    ),
    "DoraScaledBias": _note(
        "CONVENTION", "k*(x W' + b + s xd A'B'): the bias inside the magnitude (torchtune)"
    ),
    "DoraTwoMasks": _note(
        "CONVENTION", "mask2 on the base term under k - 1, mask on the adapter's (Megatron-Bridge)"
    ),
    "DropEverything": _note("CONVENTION", "p = 1: no lane is kept", "0 * inf = NaN"),
    "Merge": _note("MERGE", "the weight and bias that compute the same without dropout", "s, m or bB left out"),
    "StoredBf16": _note("MERGE", "W and the merged W are bfloat16, A and B float32", "", "bitwise"),
    "MergeOnce": _note("MERGE", "W + s BA rounded once"),
    "MergeTwice": _note("MERGE", "s BA rounded to bfloat16 before it is added"),
    "MergeLow": _note("MERGE", "A and B rounded to bfloat16, then s BA, then the sum"),
    "ShapeMismatch": _note("INVALID", "an axis has two sizes", "broadcasting or a truncated loop hides it"),
    "RankZero": _note("INVALID", "r = 0", "a division by zero, or a layer without an update"),
    "BadDropout": _note("INVALID", "p is not in [0, 1)", "no dropout, or an infinite scale"),
    "BadAlpha": _note("INVALID", "alpha = 0", "an adapter that does nothing"),
    "ZeroRow": _note("INVALID", "a row of W + s BA is 0 under DoRA", "NaN"),
    "DoraLoraBias": _note("INVALID", "a bias of B under DoRA", "it is ignored, or scaled by the magnitude"),
}
CONVENTIONS = {
    "scale": "s = alpha/r, with rslora alpha/sqrt(r); tensor s holds it in float32",
    "W": "(d_out, d_in)",
    "A": "(r, d_in)",
    "B": "(d_out, r)",
    "mask": "0 or 1/(1-p), as x; xd = x*mask; absent: no dropout",
    "layer": "y = x W' + b + s (xd A' B' + bB)",
    "dora": "y = x W' + b + (k-1) xd W' + k s xd A' B', k = m/n, n the row norms of W + s BA: peft",
    "reduction": "gradients of sum(gy*y), summed over tokens",
    "tensors": "tcId.name, float32, C order; sigma as tcId.sigma.profile.name",
}
