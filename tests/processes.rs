//! What needs processes of its own.
