"""The argument, executable: operate on residual branches and measure what that does."""
