//! The log: lines on standard error, through tracing.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;

/// What is logged from nothing to everything; each `-v` is a step to the right.
const LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];

/// What a verb logs when it is not told otherwise.
#[derive(Clone, Copy, Debug)]
pub(super) enum Usual {
    /// Warnings: the verb itself says what it does.
    Warn = 1,
    /// What an operator wants to find in the journal.
    Info = 2,
}

/// Begin to log. RUST_LOG, where it is set and makes sense, beats the options.
pub(super) fn start(usual: Usual, verbose: u8, quiet: bool) {
    let place = usual as usize + usize::from(verbose);
    let level = if quiet {
        LEVELS[0]
    } else {
        LEVELS[place.min(LEVELS.len() - 1)]
    };
    let filter = std::env::var("RUST_LOG")
        .ok()
        .filter(|text| !text.is_empty())
        .and_then(|text| EnvFilter::try_new(text).ok())
        .unwrap_or_else(|| EnvFilter::new(format!("warn,nbdsnap={level},nbdsnap_engine={level}")));
    let colour =
        stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    // A second call (a test's) keeps the first subscriber.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr)
        .with_ansi(colour)
        .with_target(false)
        // Standard error may be closed; that must not end the server.
        .log_internal_errors(false)
        .try_init();
}
