//! Programs a newcomer copies from.
