"""A demonstration's rows as both engines get them: the same examples, in the same order."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lorax_np.text.batches import Feed
from lorax_np.text.data import load_data
from lorax_np.text.examples import Example
from lorax_np.text.examples import Settings as RowSettings
from lorax_np.text.labels import Labels
from lorax_np.text.rows import task_name
from lorax_np.text.tokenizer import load_tokenizer
from lorax_np.train import TrainConfig
from lorax_np.train.settings import resolved, train_config


class Loaded(NamedTuple):
    """What is learned from and what is held out, without a model."""

    task: str
    config: TrainConfig
    feed: Feed  # of the steps
    valid: tuple[Example, ...]
    held: Feed  # of what is held out, as it stands
    labels: Labels | None
    tokens: int  # of all steps, a decoder's among them


def loaded(given: Mapping[str, Any]) -> Loaded:
    """Read the rows that settings name, cut as lorax-np train cuts them."""
    settings = resolved(("demo", given))
    config, task = train_config(settings), task_name(settings["task"])
    longest = config.max_seq_length
    how = RowSettings(longest, mask_prompt=settings["mask_prompt"], stride=min(128, longest // 2))
    data = load_data(settings["data"], load_tokenizer(settings["model"]), task=task, settings=how)
    feed, valid = config.feed(data["train"].examples, task), data["valid"].examples
    held = Feed(valid, task, batch_size=config.batch_size, shuffle=False)
    return Loaded(task, config, feed, valid, held, data["train"].labels, _tokens(feed, config.steps(feed)))


def _tokens(feed: Feed, steps: int) -> int:
    """Rows that a model computes in so many steps."""
    count, total, epoch = 0, 0, 0
    while count < steps:
        for step in feed.epoch(epoch):
            if count < steps:
                decoders = [feed.examples[i].decoder for i in step.examples]
                total += step.tokens + sum(len(ids) for ids in decoders if ids is not None)
                count += 1
        epoch += 1
    return total
