"""Names that `--model` knows, the pipelines behind them, and how they are called."""
