"""Programs that people write, each run plainly and under a monitor: nothing that their authors can observe may differ."""
