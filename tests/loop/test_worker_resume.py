"""A run that samples in worker processes resumes bit for bit."""

import resumes


def test_a_run_with_workers_resumes_from_inside_a_phase(tmp_path):
    resumes.check_resumes("grpo", tmp_path, "--model.engine=WorkerEngine", stops=[resumes.stop_at_a_step])
