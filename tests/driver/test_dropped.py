"""What a run of quantize holds is let go of with its result."""

from faults.dropped import refuse_growth, resident


def test_runs_one_after_another_take_no_more_memory(saved, tmp_path):
    refuse_growth(resident(saved("llama"), tmp_path, "gptq", 8))
