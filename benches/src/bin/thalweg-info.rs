//! What this machine offers to thalweg.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use thalweg_bench::info;

/// Says what this machine offers: each link, present or not, why, and what would fix it.
#[derive(Parser)]
#[command(name = "thalweg-info", version)]
struct Options {
    /// Print one JSON object and nothing else on standard output
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match show(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn show(options: &Options) -> anyhow::Result<()> {
    let info = info::collect()?;
    let text = match options.json {
        true => serde_json::to_string(&info)? + "\n",
        false => info::render(&info),
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}
