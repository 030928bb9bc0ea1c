//! A progress bar on standard error, for what takes longer than a second; only on a
//! terminal.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// What takes no longer needs no bar.
const AFTER: Duration = Duration::from_secs(1);

/// A bar that appears if there is time to look at it.
#[derive(Debug)]
pub(super) struct Progress {
    quiet: bool,
    what: &'static str,
    total: u64,
    begun: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Of `total` bytes.
    pub(super) fn new(what: &'static str, total: u64, quiet: bool) -> Self {
        Self {
            quiet,
            what,
            total,
            begun: Instant::now(),
            bar: None,
        }
    }

    /// So many are done.
    pub(super) fn done(&mut self, bytes: u64) {
        if self.quiet || self.begun.elapsed() < AFTER {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            // It goes to standard error, and draws nothing where that is no terminal.
            let bar = ProgressBar::new(self.total).with_message(self.what);
            let template = "{msg} {wide_bar} {percent}% {bytes}/{total_bytes} {eta}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar
        });
        bar.set_position(bytes.min(self.total));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
