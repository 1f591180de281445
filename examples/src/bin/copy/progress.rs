//! A bar on the terminal; nothing where standard error is not one.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

/// Of bytes.
pub fn bar(total_bytes: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(total_bytes);
    let template = "{bar:40} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}
