"""What works where: each cell of the table in docs/adapters.md stands on a test. Run as a module to rewrite the table.

python -m tests.callbacks.table
"""

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
BEGIN, END = "<!-- table: made by tests/callbacks/table.py -->\n", "<!-- end of table -->"
COLUMNS = {
    "plain": "plain loop (`Watch`)",
    "lightning": "Lightning",
    "fabric": "Fabric",
    "accelerate": "Accelerate (`Watch`)",
    "transformers": "HF `Trainer`",
}

ALL = dict.fromkeys(COLUMNS, "yes")
OWN_CLIP = "test_norms_are_those_before_the_trainers_clip_and_both_are_on_record"

# What, the cells, and the tests: one for all columns (its ids name the columns, or it loops over them), or by column.
ROWS: list[tuple[str, dict[str, str], str | dict[str, str]]] = [
    (
        "the same records (to 1e-6) and incidents as the others",
        ALL,
        "test_adapters:test_the_same_training_gives_the_same_records_and_incidents_by_every_trainer",
    ),
    ("observing changes no bit", ALL, "test_adapters:test_observing_is_bitwise_neutral"),
    ("gradient accumulation", ALL, "test_adapters:test_observing_is_bitwise_neutral"),
    (
        "a spike is noticed, and clipped",
        ALL,
        "test_adapters:test_the_same_training_gives_the_same_records_and_incidents_by_every_trainer",
    ),
    ("a NaN batch is skipped", ALL, "test_adapters:test_a_nan_batch_is_skipped_as_in_a_loop_that_drops_it"),
    ("state goes on after a resume", ALL, "test_adapters:test_state_resumes"),
    ("hooks come off at the end", ALL, "test_adapters:test_nothing_is_left_on_the_model_or_the_optimizer"),
    (
        "hooks come off after an exception",
        {**dict.fromkeys(COLUMNS, "with a `with`"), "lightning": "yes"},
        {
            "lightning": "test_lightning:test_nothing_is_left_on_the_model_after_a_fit_an_exception_or_ctrl_c",
            "transformers": "test_transformers:test_a_with_takes_the_hooks_off_after_an_exception",
        },
    ),
    (
        "measured and treated before the trainer's own clip",
        {
            "plain": "where `step` is called",
            "lightning": "yes",
            "fabric": "with one `fabric.call`",
            "accelerate": "where `step` is called",
            "transformers": "yes",
        },
        {
            "lightning": "test_lightning:test_observing_is_bitwise_neutral_and_norms_are_right",
            "fabric": "test_wrapped:test_fabrics_clip_hides_nothing_whether_it_comes_before_the_look_or_after",
            "transformers": f"test_transformers:{OWN_CLIP}",
        },
    ),
    (
        "gradients unscaled under a loss scaler",
        {**dict.fromkeys(COLUMNS, "yes"), "accelerate": "not tested", "transformers": "not tested"},
        {
            "lightning": "test_lightning:test_norms_are_unscaled_under_a_grad_scaler",
            "fabric": "test_wrapped:test_gradients_are_unscaled_under_fabrics_loss_scaler",
        },
    ),
    (
        "loggers that are there already",
        {
            "plain": "`sinks=`",
            "lightning": "yes",
            "fabric": "yes",
            "accelerate": "`sinks=`",
            "transformers": "by `report_to`",
        },
        {
            "lightning": "test_lightning:test_csv_logger_and_several_loggers_at_once",
            "fabric": "test_wrapped:test_fabrics_loggers_and_validation_are_used",
            "transformers": "test_transformers:test_tensorboard_and_a_run_folder_are_written",
        },
    ),
    (
        "validation metrics on the record",
        {
            "plain": "`watch.validation`",
            "lightning": "yes",
            "fabric": "with one `fabric.call`",
            "accelerate": "`watch.validation`",
            "transformers": "yes",
        },
        {
            "lightning": "test_lightning:test_validation_metrics_reach_the_record_after",
            "fabric": "test_wrapped:test_fabrics_loggers_and_validation_are_used",
            "transformers": "test_transformers:test_evaluation_metrics_stand_on_the_next_record",
        },
    ),
    (
        "a stop ends the run",
        {
            "plain": "`TrainingStopped`",
            "lightning": "yes",
            "fabric": "`TrainingStopped`",
            "accelerate": "`TrainingStopped`",
            "transformers": "yes",
        },
        {
            "lightning": "test_lightning:test_actions_reach_the_trainer",
            "fabric": "test_wrapped:test_ten_bad_steps_stop_a_fabric_loop_with_an_error",
            "transformers": "test_transformers:test_stop_ends_the_training_and_checkpoint_saves",
        },
    ),
    (
        "several optimizers that step in turns",
        {
            "plain": "`step(optimizer=)`",
            "lightning": "yes",
            "fabric": 'named to `"watch"`',
            "accelerate": "`step(optimizer=)`",
            "transformers": "has one",
        },
        {
            "lightning": "test_lightning:test_optimizers_that_step_in_turns_are_measured_each_on_its_own",
            "fabric": "test_wrapped:test_optimizers_named_together_share_one_watch_and_step_in_turns",
        },
    ),
    (
        "not a line in the script (`GRADWATCH=1`)",
        {"plain": "no", "lightning": "yes", "fabric": "yes", "accelerate": "no", "transformers": "no"},
        {
            "lightning": "test_doors:test_a_script_is_watched_without_a_changed_line",
            "fabric": "test_doors:test_a_fabric_script_is_watched_without_a_changed_line",
        },
    ),
    (
        "surgery between task gradients",
        {"plain": "yes", "lightning": "yes", "fabric": "yes", "accelerate": "yes", "transformers": "yes"},
        dict.fromkeys(COLUMNS, "test_surgery_homes:test_surgery_is_the_same_in_every_home"),
    ),
]


def table() -> str:
    """Return the table as Markdown."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {what} | " + " | ".join(cells[c] for c in COLUMNS) + " |" for what, cells, _ in ROWS]
    return "\n".join(lines) + "\n"


def rewritten(text: str) -> str:
    """Return a page with its table made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
