//! The command line: one file a verb, and what they share.
//!
//! Exit statuses: 0 as asked, 1 refused or failed, 2 an argument that makes no
//! sense (of `dm`: 1, as dmsetup has it). A refusal is one line on standard error that
//! names what it is about.

mod clients;
mod cow;
mod demo;
mod dm;
mod events;
mod freeze;
mod listen;
mod log;
mod merge;
mod orders;
mod pages;
mod serve;
pub mod size;
mod snapshot;
mod spec;
mod volume;
pub mod when;

use std::ffi::OsString;
use std::fmt::Display;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};

/// Serve live disks and their snapshots over NBD.
///
/// A snapshot keeps the past of a disk in a COW store of Linux's dm-snapshot
/// layout: before a chunk of the disk is overwritten for the first time, its old
/// bytes are copied there. Disk and snapshots can be read and written over NBD at
/// the same time, from virtual machines, by nbd-client, qemu and libnbd.
#[derive(Debug, Parser)]
#[command(
    name = "nbdsnap",
    version,
    after_help = "'nbdsnap serve --help' and 'nbdsnap demo --help' say more, with examples."
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    #[command(flatten)]
    verbosity: Verbosity,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Serve(serve::ServeArgs),
    Snapshot(snapshot::SnapshotArgs),
    Volume(volume::VolumeArgs),
    Suspend(volume::SuspendArgs),
    Resume(volume::ResumeArgs),
    Clients(clients::ClientsArgs),
    Disconnect(clients::DisconnectArgs),
    Events(events::EventsArgs),
    Dm(Box<dm::DmArgs>),
    Cow(cow::CowArgs),
    Completions(pages::CompletionsArgs),
    Man(pages::ManArgs),
    Demo(demo::DemoArgs),
}

/// How much is logged.
#[derive(Clone, Copy, Debug, Args)]
struct Verbosity {
    /// Log more to standard error; may be given several times.
    #[arg(short, long, global = true, action = clap::ArgAction::Count, conflicts_with = "quiet", display_order = 900)]
    verbose: u8,
    /// Log errors only. RUST_LOG, where set, beats both.
    #[arg(short, long, global = true, display_order = 901)]
    quiet: bool,
}

/// How a verb ended, other than well.
#[derive(Debug)]
enum Failure {
    /// What was asked for makes no sense.
    Usage(String),
    /// It was refused, or it failed.
    Refused(String),
    /// It has found problems, and printed them: there is nothing to add.
    Found,
}

impl Failure {
    fn usage(error: impl Display) -> Self {
        Self::Usage(error.to_string())
    }

    fn refused(error: impl Display) -> Self {
        Self::Refused(error.to_string())
    }
}

/// The program.
pub fn main() -> ExitCode {
    // The runtime has SIGPIPE ignored from the start: a client or a reader of
    // standard output that goes away is an error of that one write.
    let mut args: Vec<OsString> = std::env::args_os().collect();
    if is_dm(verb_of(&args)) {
        dm::usage::spell_out(&mut args);
    }
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => return refuse_arguments(&error, &args),
    };
    let usual = match cli.verb {
        Verb::Serve(_) => log::Usual::Info,
        _ => log::Usual::Warn,
    };
    log::start(usual, cli.verbosity.verbose, cli.verbosity.quiet);
    #[cfg(feature = "mutants")]
    if let Err(message) = crate::law::announce() {
        complain(&message);
        return ExitCode::from(2);
    }
    let (verb, ended) = match cli.verb {
        Verb::Serve(args) => ("serve", serve::run(args)),
        Verb::Snapshot(args) => ("snapshot", snapshot::run(args)),
        Verb::Volume(args) => ("volume", volume::run(args)),
        Verb::Suspend(args) => ("suspend", volume::suspend(args)),
        Verb::Resume(args) => ("resume", volume::resume(args)),
        Verb::Clients(args) => ("clients", clients::list(&args)),
        Verb::Disconnect(args) => ("disconnect", clients::disconnect(&args)),
        Verb::Events(args) => ("events", events::run(&args)),
        Verb::Dm(args) => ("dm", dm::run(*args, cli.verbosity.verbose)),
        Verb::Cow(args) => ("cow", cow::run(args, cli.verbosity.quiet)),
        Verb::Completions(args) => ("completions", pages::completions(&args)),
        Verb::Man(args) => ("man", pages::man(&args)),
        Verb::Demo(args) => ("demo", demo::run(&args)),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(message)) => {
            complain(&format!("{message} (see 'nbdsnap {verb} --help')"));
            ExitCode::from(2)
        }
        Err(Failure::Refused(message)) => {
            complain(&message);
            ExitCode::FAILURE
        }
        Err(Failure::Found) => ExitCode::FAILURE,
    }
}

/// One line on standard error, which may be closed.
fn complain(message: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "nbdsnap: {message}");
}

/// Help and version are printed as they are; a refusal becomes one line.
fn refuse_arguments(error: &clap::Error, args: &[OsString]) -> ExitCode {
    let asks = matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    );
    let verb = verb_of(args);
    let help = help_page(verb);
    if !asks && is_dm(verb) {
        return dm::usage::refuse(error, &help);
    }
    if asks || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
        return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
    }
    complain(&one_line(&error.to_string(), &help));
    ExitCode::from(2)
}

/// The verb that a command line names, if there is such a verb.
fn verb_of(args: &[OsString]) -> Option<&OsString> {
    let mut words = args.iter().skip(1);
    let verb = words.find(|arg| !arg.as_encoded_bytes().starts_with(b"-"));
    verb.filter(|arg| Cli::command().find_subcommand(arg).is_some())
}

fn is_dm(verb: Option<&OsString>) -> bool {
    verb.is_some_and(|verb| verb == "dm")
}

/// The command that explains the command line that was given: the verb's help,
/// if it names a verb.
fn help_page(verb: Option<&OsString>) -> String {
    match verb {
        Some(verb) => format!("nbdsnap {} --help", verb.display()),
        None => "nbdsnap --help".to_owned(),
    }
}

/// The sentence of a refusal of clap's, without the usage that follows it.
fn one_line(text: &str, help: &str) -> String {
    let paragraphs: Vec<String> = text
        .split("\n\n")
        .take_while(|part| !part.starts_with("Usage:") && !part.starts_with("For more"))
        .map(|part| part.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    let sentence = paragraphs.join("; ");
    format!(
        "{} (see '{help}')",
        sentence.strip_prefix("error: ").unwrap_or(&sentence)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(args: &[&str]) -> String {
        let words: Vec<OsString> = args.iter().map(OsString::from).collect();
        let help = help_page(verb_of(&words));
        one_line(&Cli::try_parse_from(args).unwrap_err().to_string(), &help)
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn refusals_are_one_line() {
        for args in [
            vec!["nbdsnap", "snapshot", "create", "d"],
            vec!["nbdsnap", "serve", "d", "--no-such"],
            vec!["nbdsnap", "serve", "d", "--snapshot", "d@s"],
            vec!["nbdsnap", "serve", "d", "--listen", "nowhere"],
            vec!["nbdsnap", "serve", "d", "--threads", "0"],
            vec!["nbdsnap", "serve", "-q", "-v", "d"],
            vec!["nbdsnap", "bogus"],
        ] {
            let line = refusal(&args);
            assert!(
                !line.contains('\n') && !line.contains("Usage:") && line.len() > 30,
                "{line}"
            );
        }
        let line = refusal(&["nbdsnap", "serve", "d", "--snapshot", "d@s=c,chunk=4Q"]);
        assert!(
            line.contains("d@s=c,chunk=4Q") && line.contains("unknown unit 'Q'"),
            "{line}"
        );
        assert!(line.ends_with("(see 'nbdsnap serve --help')"), "{line}");
        assert!(refusal(&["nbdsnap", "bogus"]).ends_with("(see 'nbdsnap --help')"));
    }
}
