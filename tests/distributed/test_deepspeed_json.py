"""A DeepSpeed JSON of the user's is part of what a run is, whatever the file is called."""

import json


def test_other_words_at_the_same_place_are_not_resumed(launcher):
    """Another place for the same words continues the run."""

    def written(settings: dict, name: str) -> str:
        (launcher.folder / name).write_text(json.dumps(settings))
        return f"engine.json_file={launcher.folder / name}"

    def run(steps: int, json_file: str, expect: int = 0) -> str:
        words = ("model.depth=1", f"train.steps={steps}", json_file)
        return launcher.train("run", *words, expect=expect)

    bucket = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 10**6}}
    run(1, written(bucket, "first.json"))
    second = written({**bucket, "dump_state": False}, "second.json")
    assert "at step 1" in run(2, second)
    written({"zero_optimization": {"reduce_bucket_size": 2 * 10**6}}, "second.json")
    for other in (second, "engine.json_file=null"):
        text = run(3, other, expect=2)
        assert "engine.json_file" in text and "reduce_bucket_size" in text, text
