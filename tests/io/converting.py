"""Conversions there and back, and refusals: what the tests of formats share."""

import pytest
from convert_samples import SHAPES, saved

from lorax_np.errors import FormatError
from lorax_np.io.convert import FORMATS, convert
from lorax_np.io.convert.model import Options, base_of

NAMES = sorted(SHAPES)
ONE = "model.layers.1.self_attn.q_proj"
ROWS = SHAPES[ONE][0]
EVERY = sorted(set(FORMATS) - {"peft"})


def there(folder, what, target, **options):
    """Write a PEFT directory and convert it; the path of what came out."""
    source = saved(folder / "peft", what)
    dest = folder / {"gguf": "a.gguf", "kohya": "a.safetensors", "loralib": "b.safetensors"}.get(target, target)
    done = convert(source, target, dest, **options)
    assert (done.source_format, done.target_format, done.sites) == ("peft", target, len(what.adapters))
    assert all(path.is_file() for path in done.files)
    return dest, done


def back(folder, path, target, **options):
    """Convert to a PEFT directory; the directory."""
    done = convert(path, "peft", folder / "back", **options)
    assert (done.source_format, done.target_format) == (target, "peft")
    return folder / "back"


def refusal(call, words):
    with pytest.raises(FormatError) as caught:
        call()
    message = str(caught.value)
    assert words in message, message
    assert message.isprintable()
    assert ": expected " in message
    assert ", got " in message
    return message


def options(checkpoint=None, **more):
    return Options(base=base_of(checkpoint) if checkpoint else None, **more)
