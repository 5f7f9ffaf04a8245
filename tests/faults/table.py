"""Every fault by its name."""

import os

from tests.faults.disturbed import (
    FAKETIME,
    change_data_under_trainer,
    cut_data_under_trainer,
    fill_disk_under_commands,
    jump_clock_under_trainer,
    lose_network_store_under_trainer,
    remove_folder_under_trainer,
    signal_trainer,
    train_long,
)
from tests.faults.entries import (
    NEED_ROOT,
    Entry,
    fill_disk_under_beton_writer,
    kill_beton_writer,
    kill_checkpoint_writer,
    write_to_a_read_only_disk,
)
from tests.faults.killed import kill_evaluate, kill_study, kill_trainer
from tests.support import network

ENTRIES: dict[str, Entry] = {
    entry.__name__: entry
    for entry in (
        kill_beton_writer,
        kill_checkpoint_writer,
        kill_trainer,
        kill_evaluate,
        kill_study,
        signal_trainer,
        cut_data_under_trainer,
        change_data_under_trainer,
        remove_folder_under_trainer,
        jump_clock_under_trainer,
        lose_network_store_under_trainer,
        train_long,
        fill_disk_under_beton_writer,
        fill_disk_under_commands,
        write_to_a_read_only_disk,
    )
}


def missing(name: str) -> str:
    """What the fault needs and this machine lacks; empty where nothing."""
    if name in NEED_ROOT and os.geteuid():
        return "root, who may mount a small disk"
    if name == jump_clock_under_trainer.__name__ and not FAKETIME.exists():
        return "libfaketime (apt-get install libfaketime)"
    if name == lose_network_store_under_trainer.__name__:
        return network.missing()
    return ""
