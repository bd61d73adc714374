"""Which of DeepSpeed's lines reach the terminal."""

import logging

from speed_engine.engines.deepspeed import _tells_something


def test_only_what_is_known_to_say_nothing_is_left_out(caplog):
    logger = logging.Logger("like DeepSpeed's")
    logger.addHandler(caplog.handler)
    logger.addFilter(_tells_something)
    logger.warning(
        "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable"
    )
    logger.warning(
        "**** You are using ZeRO with an %s optimizer, proceed with caution *****", "untested"
    )
    logger.warning("overflow, %s", "skipping a step")
    logger.error("You are using something else")
    assert [record.getMessage() for record in caplog.records] == [
        "overflow, skipping a step",
        "You are using something else",
    ]
