"""The report of one run, from what it left in its folder."""

import pytest
import torch

from longrl.commands.main import main
from longrl.commands.report import report_run
from longrl.evaluation.sample_grids import PromptSamples, encode_images, picture_grid


def test_curves_and_pictures_of_a_run_are_on_one_page(tmp_path):
    run = tmp_path / "my_run"
    (run / "logs" / "version_0").mkdir(parents=True)
    (run / "logs" / "version_0" / "metrics.csv").write_text(
        "step,reward/mean,reward/mean_colour,reward/std_in_group\n0,0.1,0.2,0.3\n1,0.3,0.4,0.3\n"
    )
    (run / "pictures").mkdir()
    grid = picture_grid([PromptSamples("p", [torch.zeros(1, 3, 8, 8, dtype=torch.uint8)], ["0.5"])])
    for step in (0, 50, 100):
        (run / "pictures" / f"val_{step:06}.png").write_bytes(encode_images([grid], "png"))
    main(["report", "--run", str(run), "--num_sheets", "2"])
    text = (run / "report.html").read_text()
    assert "<h1>my_run</h1>" in text
    assert "Learning curves: my_run" in text
    assert "after step 0<" in text
    assert "after step 100<" in text
    assert "after step 50<" not in text
    assert (run / "curves_my_run.png").exists()


def test_the_page_of_an_evaluation_is_not_replaced(tmp_path):
    (tmp_path / "logs" / "version_0").mkdir(parents=True)
    (tmp_path / "logs" / "version_0" / "metrics.csv").write_text("step,reward/mean\n0,0.1\n")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds the results of an evaluation \(results\.json\), whose report\.html"):
        report_run(str(tmp_path))


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds neither a metrics.csv nor pictures; name the run_dir"):
        report_run(str(tmp_path))
