//! Random sequences of dm commands, good ones and bad ones, with random requests
//! between them, on both sides. `NBDSNAP_SEED` plays one again, `NBDSNAP_LONG` goes
//! on with longer ones.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nbdsnap_tests::harness::files::folder;
use nbdsnap_tests::harness::program::program;
use nbdsnap_tests::harness::random::long_run;
use nbdsnap_tests::harness::server::{Serve, Server};
use nbdsnap_tests::kernel::dm::bad;
use nbdsnap_tests::kernel::dm::generate::{Sequence, sequence};
use nbdsnap_tests::kernel::dm::layout::{DISKS, make_disks};
use nbdsnap_tests::kernel::dm::play::{Devices, Side};
use nbdsnap_tests::kernel::dm::step::{Outcome, Step};
use nbdsnap_tests::kernel::dm::words::{Numbers, difference, probes};
use nbdsnap_tests::kernel::machine::Machine;
use nbdsnap_tests::kernel::program::stripped;
use nbdsnap_tests::kernel::seed;
use nbdsnap_tests::kernel::vm::Vm;

use super::{PLAYER, SUITE};

/// Steps of a normal run.
const STEPS: usize = 160;

/// No step takes nbdsnap so long: it waits for something that is suspended.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a side answered to the probes, then to the steps: in common words.
fn translated(outcomes: &[Outcome], probes: usize) -> Vec<Outcome> {
    let numbers = Numbers::learn(&outcomes[..probes]);
    let outcomes = outcomes[probes..].iter();
    outcomes.map(|outcome| numbers.translate(outcome)).collect()
}

/// Probes and steps.
fn with_probes(steps: &[Step]) -> (usize, Vec<Step>) {
    let probes = probes(DISKS);
    (probes.len(), [&probes, steps].concat())
}

/// The kernel's answers.
pub(super) fn on_the_kernel(machine: &Machine, disks: &[PathBuf], steps: &[Step]) -> Vec<Outcome> {
    let (probes, steps) = with_probes(steps);
    let mut vm = Vm::new(machine);
    for disk in disks {
        vm.disk(disk);
    }
    let lines: Vec<String> = steps.iter().map(Step::to_line).collect();
    vm.program(&stripped(Path::new(PLAYER)))
        .file("steps", lines.join("\n"));
    let paths: Vec<String> = ('a'..).take(DISKS).map(|c| format!("/dev/vd{c}")).collect();
    let began = Instant::now();
    let output = vm.run(&format!("dm-player /test/steps {}", paths.join(" ")));
    let outcomes = Outcome::parse_all(output.lines.iter().map(String::as_str));
    assert_eq!(outcomes.len(), steps.len(), "outcomes of all steps");
    println!(
        "the kernel: {} steps in {:.0?}",
        steps.len(),
        began.elapsed()
    );
    translated(&outcomes, probes)
}

/// nbdsnap's answers, and the server, which is still to be stopped: whatever differs
/// is told before its end.
pub(super) fn on_nbdsnap(
    folder: &Path,
    disks: &[PathBuf],
    steps: &[Step],
) -> (Vec<Outcome>, Server) {
    let (probes, steps) = with_probes(steps);
    let server = Serve::on_socket_in(folder).control_in(folder).start();
    let control = server.control().display().to_string();
    let mut side = Side {
        program: ["dm", "--control", &control].map(str::to_owned).to_vec(),
        disks: disks
            .iter()
            .map(|disk| disk.display().to_string())
            .collect(),
        devices: Devices::Exports(folder.join("nbd.sock").display().to_string()),
    };
    side.program.insert(0, program().display().to_string());
    let began = Instant::now();
    let mut outcomes: Vec<Outcome> = Vec::new();
    for (n, step) in steps.iter().enumerate() {
        let began = Instant::now();
        outcomes.push(side.play(step));
        if began.elapsed() > PATIENCE {
            let before: Vec<String> = steps[..n].iter().map(ToString::to_string).collect();
            let before = before.join("\n");
            panic!(
                "after\n{before}\nnbdsnap takes {PATIENCE:?} for {step}: {}",
                outcomes[n]
            );
        }
    }
    println!("nbdsnap: {} steps in {:.0?}", steps.len(), began.elapsed());
    (translated(&outcomes, probes), server)
}

/// The model and the kernel agree on what succeeds; if not, the model is wrong, and
/// the sequence may not mean what it should.
fn agrees_with_the_model(sequence: &Sequence, outcomes: &[Outcome]) {
    let Sequence { steps, expected } = sequence;
    for (n, outcome) in outcomes.iter().enumerate() {
        let Some(expected) = expected[n] else {
            continue;
        };
        let before: Vec<String> = steps[..n].iter().map(ToString::to_string).collect();
        assert!(
            (outcome.code == 0) == expected,
            "after\n{}\nthe model expects {expected} of step {n}, {}\n{outcome}",
            before.join("\n"),
            steps[n],
        );
    }
}

/// Where the disks differ at the end, in sectors: for whoever looks for the cause.
fn ranges(left: &[PathBuf], right: &[PathBuf]) -> String {
    let mut told = String::new();
    for (letter, (left, right)) in ('a'..).zip(left.iter().zip(right)) {
        let [left, right] = [left, right].map(|path| std::fs::read(path).expect("a disk"));
        let sectors = left.chunks(512).zip(right.chunks(512)).enumerate();
        let differ = sectors.filter(|(_, (left, right))| left != right);
        let numbers: Vec<String> = differ.map(|(n, _)| n.to_string()).collect();
        let first = numbers
            .iter()
            .take(40)
            .cloned()
            .collect::<Vec<_>>()
            .join(" ");
        let _ = writeln!(told, "@{letter}: {} sectors differ: {first}", numbers.len());
    }
    told
}

/// Both sides on the same disks.
fn both(machine: &Machine, seed: u64, steps: usize) {
    let sequence = sequence(seed, steps);
    let (here, there) = (folder(), folder());
    let [ours, theirs] = [&here, &there].map(|folder| make_disks(folder.path(), seed));
    let (answers, server) = on_nbdsnap(here.path(), &ours, &sequence.steps);
    let kernel = on_the_kernel(machine, &theirs, &sequence.steps);
    agrees_with_the_model(&sequence, &kernel);
    let told = difference(&sequence.steps, &kernel, &answers, ["dmsetup", "nbdsnap"]);
    if let Some(told) = told {
        let disks = ranges(&theirs, &ours);
        panic!("seed {seed}: {told}\nat the end\n{disks}");
    }
    server.stop();
}

#[test]
fn random_commands_have_the_kernels_answers() {
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let mut seed = seed(SUITE, "random_commands_have_the_kernels_answers");
    both(machine, seed, STEPS);
    let Some(long) = long_run() else {
        return;
    };
    let began = Instant::now();
    while began.elapsed() < long {
        seed += 1;
        println!("seed {seed}");
        both(machine, seed, STEPS * 8);
    }
}

/// The cheap half of the comparison, without a machine: what succeeds on nbdsnap is what
/// the model of the kernel's rules expects.
#[test]
fn random_commands_succeed_as_the_model_expects() {
    let mut seed = seed(SUITE, "random_commands_succeed_as_the_model_expects");
    let until = Instant::now() + long_run().unwrap_or_default();
    loop {
        let sequence = sequence(seed, STEPS);
        let folder = folder();
        let disks = make_disks(folder.path(), seed);
        let (answers, server) = on_nbdsnap(folder.path(), &disks, &sequence.steps);
        agrees_with_the_model(&sequence, &answers);
        server.stop();
        seed += 1;
        if Instant::now() >= until {
            break;
        }
        println!("seed {seed}");
    }
}

/// Random sequences take a few of the refused command lines each.
#[test]
fn every_refused_command_is_refused_alike() {
    if long_run().is_none() {
        println!("only with NBDSNAP_LONG: it takes another machine");
        return;
    }
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let mut steps = vec![Step::dm(["create", "there", "--table", "0 8 zero"])];
    steps.extend(bad::every("there"));
    let refused = 1..steps.len();
    let looks = [&["table"][..], &["table", "--inactive"], &["info", "-c"]];
    steps.extend(looks.map(|words| Step::dm(words.iter().copied())));
    let (here, there) = (folder(), folder());
    let [ours, theirs] = [&here, &there].map(|folder| make_disks(folder.path(), 1));
    let kernel = on_the_kernel(machine, &theirs, &steps);
    let (answers, server) = on_nbdsnap(here.path(), &ours, &steps);
    for n in refused {
        assert_ne!(kernel[n].code, 0, "the kernel takes {}", steps[n]);
    }
    if let Some(told) = difference(&steps, &kernel, &answers, ["dmsetup", "nbdsnap"]) {
        panic!("{told}");
    }
    server.stop();
}

/// What is compared is the same whenever it is played, else a difference would
/// mean nothing.
#[test]
fn the_kernel_answers_twice_the_same() {
    if long_run().is_none() {
        println!("only with NBDSNAP_LONG: it takes another machine");
        return;
    }
    let Some(machine) = Machine::for_suite(SUITE) else {
        return;
    };
    let seed = seed(SUITE, "the_kernel_answers_twice_the_same");
    let sequence = sequence(seed, STEPS * 4);
    let [one, other] = [(), ()].map(|()| {
        let folder = folder();
        on_the_kernel(machine, &make_disks(folder.path(), seed), &sequence.steps)
    });
    agrees_with_the_model(&sequence, &one);
    if let Some(told) = difference(&sequence.steps, &one, &other, ["once", "again"]) {
        panic!("seed {seed}: {told}");
    }
}
