//! Command lines that make no sense, as dmsetup refuses them: it says what is wrong,
//! then that it could not process the command line or how it is used, and ends with 1.
//! Scripts that were written for it look for that; everywhere else nbdsnap ends with 2.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::CommandFactory;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::line::Verb;
use crate::cli::{Cli, one_line};

/// dmsetup has `--version` for `version`, as the only one of its verbs.
pub(in crate::cli) fn spell_out(args: &mut [OsString]) {
    if let Some(arg) = args.last_mut().filter(|arg| *arg == "--version") {
        *arg = "version".into();
    }
}

/// Say why a command line of `dm` makes no sense; `help` explains what would.
pub(in crate::cli) fn refuse(error: &clap::Error, help: &str) -> ExitCode {
    // It may be closed.
    let _ = std::io::stderr().write_all(said(error, help).as_bytes());
    ExitCode::FAILURE
}

/// What is said of it.
pub(super) fn said(error: &clap::Error, help: &str) -> String {
    let what = match error.kind() {
        ErrorKind::InvalidSubcommand => {
            let known = verbs().join(", ");
            return format!("Unknown command.\nUsage: {USAGE}\nCommands: {known} (see '{help}')\n");
        }
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let known = verbs().join(", ");
            return format!("Usage: {USAGE}\nCommands: {known} (see '{help}')\n");
        }
        ErrorKind::UnknownArgument => match named(error) {
            Some(long) if long.starts_with("--") => format!("unrecognized option '{long}'"),
            Some(short) => format!("invalid option -- '{}'", short.trim_start_matches('-')),
            None => one_line(&error.to_string(), help),
        },
        ErrorKind::InvalidValue if value(error).is_some_and(str::is_empty) => {
            let option = named(error).unwrap_or_default();
            format!("option '{}' requires an argument", switch(option))
        }
        ErrorKind::TooManyValues => {
            let option = named(error).unwrap_or_default();
            format!("option '{}' doesn't allow an argument", switch(option))
        }
        _ => one_line(&error.to_string(), help),
    };
    let hint = if what.ends_with(')') {
        String::new()
    } else {
        format!(" (see '{help}')")
    };
    format!("nbdsnap dm: {what}{hint}\nCouldn't process command line.\n")
}

const USAGE: &str = "nbdsnap dm COMMAND [OPTIONS] [DEVICE...]";

/// The option that an error is about.
fn named(error: &clap::Error) -> Option<&str> {
    match error.get(ContextKind::InvalidArg)? {
        ContextValue::String(option) => Some(option),
        _ => None,
    }
}

/// The value that an error is about.
fn value(error: &clap::Error) -> Option<&str> {
    match error.get(ContextKind::InvalidValue)? {
        ContextValue::String(value) => Some(value),
        _ => None,
    }
}

/// An option without the name of its value.
fn switch(option: &str) -> &str {
    option.split([' ', '=']).next().unwrap_or(option)
}

/// All verbs.
fn verbs() -> Vec<String> {
    let command = Cli::command();
    let dm = command.find_subcommand("dm").expect("this verb");
    let verbs = dm.get_subcommands().map(clap::Command::get_name);
    verbs
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

/// How a verb is used, in a line.
pub(super) fn of(verb: Verb) -> String {
    let mut command = Cli::command();
    command.build();
    let dm = command.find_subcommand_mut("dm").expect("this verb");
    let verb = dm.find_subcommand_mut(name(verb)).expect("a verb");
    verb.render_usage().to_string()
}

/// A verb on the command line.
fn name(verb: Verb) -> &'static str {
    match verb {
        Verb::Create => "create",
        Verb::Load => "load",
        Verb::Clear => "clear",
        Verb::Suspend => "suspend",
        Verb::Resume => "resume",
        Verb::Remove => "remove",
        Verb::RemoveAll => "remove_all",
        Verb::WipeTable => "wipe_table",
        Verb::Rename => "rename",
        Verb::Table => "table",
        Verb::Status => "status",
        Verb::Info => "info",
        Verb::Ls => "ls",
        Verb::Deps => "deps",
        Verb::Wait => "wait",
        Verb::Targets => "targets",
        Verb::TargetVersion => "target-version",
        Verb::Version => "version",
        Verb::Message => "message",
        Verb::Mknodes => "mknodes",
        Verb::Mangle => "mangle",
    }
}
