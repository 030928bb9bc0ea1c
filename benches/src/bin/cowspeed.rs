//! `cowspeed`: how fast the offline tools move a snapshot's bytes, beside `cp` of the
//! same bytes. See benches/README.md.
//!
//! A disk, and a store that holds every chunk of it, in runs that lie in random order:
//! no holes, nothing shared. In each turn its snapshot is extracted, and the disk is rolled
//! back to it, each beside `cp --reflink=never --sparse=never` of the store and fsync: now
//! before it and now behind it, after the same preparation on files as fresh. What the
//! tools made is compared with what it has to be. How far two neighbouring runs of cp lie
//! apart is how far the machine can be trusted.
//! With `--exceptions` also how long `inspect` and `check` look at so many.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use nbdsnap::cow::CowError;
use nbdsnap::cow::target::Target;
use nbdsnap_benches::BenchError;
use nbdsnap_benches::plan::{Order, Plan, Rng};
use nbdsnap_benches::served::{Bench, end};
use nbdsnap_format::{ChunkSize, Exception, Header, Layout};
use serde_json::json;

/// Compared and made in pieces of this size.
const PIECE: usize = 1 << 20;

/// The least speed of each tool, as a part of cp's.
const BAR: f64 = 0.8;

/// What is measured beside cp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Tool {
    /// The snapshot is written to a new image
    Extract,
    /// The disk is rolled back
    Merge,
}

impl Tool {
    const ALL: [Self; 2] = [Self::Extract, Self::Merge];

    fn name(self) -> &'static str {
        match self {
            Self::Extract => "extract",
            Self::Merge => "merge",
        }
    }
}

/// Measures extract and merge beside cp.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Mebibytes of the disk
    #[arg(long, default_value_t = 1024)]
    size: u64,
    /// Kibibytes of a chunk
    #[arg(long, default_value_t = 16)]
    chunk: u64,
    /// Chunks that lie together
    #[arg(long, default_value_t = 1)]
    run: u64,
    /// Turns: in each, every tool and a cp of its own
    #[arg(long, default_value_t = 5)]
    turns: usize,
    /// Measure this tool alone
    #[arg(long)]
    only: Option<Tool>,
    /// Also look at a sparse store of so many exceptions (5000000 are the promise)
    #[arg(long, default_value_t = 0)]
    exceptions: u64,
    /// Let cp and extract find the files in the page cache. (A merge never does: what is
    /// opened to be written is read from the disk anew)
    #[arg(long)]
    cached: bool,
    /// Fail unless each tool has four fifths of the speed of cp
    #[arg(long)]
    check_bar: bool,
    #[command(flatten)]
    bench: Bench,
}

fn main() -> ExitCode {
    end("cowspeed", run(&Options::parse()))
}

fn unsuitable(what: &Path) -> impl FnOnce(std::io::Error) -> BenchError + '_ {
    move |cause| BenchError::File {
        path: what.display().to_string(),
        cause,
    }
}

#[expect(clippy::needless_pass_by_value, reason = "handed to map_err")]
fn refused(error: CowError) -> BenchError {
    BenchError::Unsuitable(error.to_string())
}

fn chunk_size(bytes: u64) -> Result<ChunkSize, BenchError> {
    ChunkSize::from_bytes(bytes).map_err(|error| BenchError::Unsuitable(error.to_string()))
}

/// The files of the measurement.
struct Files {
    program: PathBuf,
    cached: bool,
    /// The disk as it is now.
    origin: PathBuf,
    /// The store.
    store: PathBuf,
    /// What its snapshot shows.
    snapshot: PathBuf,
    /// What a turn makes, and takes away again.
    disk: PathBuf,
    cow: PathBuf,
    made: PathBuf,
}

impl Files {
    fn new(options: &Options, folder: &Path) -> Result<Self, BenchError> {
        let named = |name: &str| folder.join(name);
        Ok(Self {
            program: options.bench.program()?,
            cached: options.cached,
            origin: named("origin"),
            store: named("store"),
            snapshot: named("snapshot"),
            disk: named("disk"),
            cow: named("cow"),
            made: named("made"),
        })
    }

    /// Make the disk, the store, and what the snapshot shows.
    fn fill(&self, options: &Options) -> Result<(), BenchError> {
        let (bytes, chunk) = (options.size << 20, options.chunk << 10);
        let mut rng = Rng::new(options.bench.seed);
        random_file(&self.origin, bytes, &mut rng)?;
        random_file(&self.snapshot, bytes, &mut rng)?;
        let chunk_size = chunk_size(chunk)?;
        let layout = Layout::new(chunk_size);
        let run = chunk * options.run.max(1);
        let mut order = Plan::new(Order::Once, bytes, run as u32, run, options.bench.seed)?;
        let store_bytes = layout.sectors_needed_for_origin(bytes) * 512;
        let store = Target::create(&self.cow, store_bytes, false).map_err(refused)?;
        let mut areas = store.areas(chunk_size).map_err(refused)?;
        let snapshot = File::open(&self.snapshot).map_err(unsuitable(&self.snapshot))?;
        let mut content = vec![0; chunk as usize];
        let mut n = 0;
        while let Some(offset) = order.next_offset() {
            for at in (offset..(offset + run).min(bytes)).step_by(chunk as usize) {
                snapshot
                    .read_exact_at(&mut content, at)
                    .map_err(unsuitable(&self.snapshot))?;
                let (old, new) = (chunk_size.origin_chunk(at), layout.data_chunk(n));
                store
                    .write_all(chunk_size.cow_offset(new), &content)
                    .map_err(refused)?;
                areas.push(Exception { old, new }).map_err(refused)?;
                n += 1;
            }
        }
        let header = Header {
            valid: true,
            chunk_size,
        };
        areas.finish(header, &[]).map_err(refused)?;
        store.finish().map_err(refused)?;
        // What is zero in it is a hole so far.
        copy(&self.cow, &self.store)?;
        remove(&[&self.cow]);
        Ok(())
    }

    /// How long cp takes, or a tool, on fresh files; then they are gone.
    fn measure(&self, tool: Option<Tool>) -> Result<f64, BenchError> {
        copy(&self.origin, &self.disk)?;
        copy(&self.store, &self.cow)?;
        self.forget(&[&self.origin, &self.store, &self.disk, &self.cow])?;
        let taken = match tool {
            None => self.cp()?,
            Some(Tool::Extract) => self.extract()?,
            Some(Tool::Merge) => self.merge()?,
        };
        remove(&[&self.disk, &self.cow, &self.made]);
        Ok(taken.as_secs_f64())
    }

    /// cp of the store, and fsync.
    fn cp(&self) -> Result<Duration, BenchError> {
        let begun = Instant::now();
        copy(&self.cow, &self.made)?;
        Ok(begun.elapsed())
    }

    fn extract(&self) -> Result<Duration, BenchError> {
        let taken = self.nbdsnap(&[
            "extract".as_ref(),
            self.cow.as_ref(),
            "--origin".as_ref(),
            self.disk.as_ref(),
            "-o".as_ref(),
            self.made.as_ref(),
        ])?;
        self.compare(&self.made)?;
        Ok(taken)
    }

    fn merge(&self) -> Result<Duration, BenchError> {
        let taken = self.nbdsnap(&[
            "merge".as_ref(),
            self.cow.as_ref(),
            "--origin".as_ref(),
            self.disk.as_ref(),
            "--adopt".as_ref(),
        ])?;
        self.compare(&self.disk)?;
        Ok(taken)
    }

    /// Take files out of the page cache.
    fn forget(&self, paths: &[&Path]) -> Result<(), BenchError> {
        rustix::fs::sync();
        if self.cached {
            return Ok(());
        }
        paths.iter().try_for_each(|path| {
            let file = File::open(path).map_err(unsuitable(path))?;
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)
                .map_err(|errno| unsuitable(path)(errno.into()))
        })
    }

    fn nbdsnap(&self, args: &[&Path]) -> Result<Duration, BenchError> {
        let begun = Instant::now();
        let status = Command::new(&self.program)
            .args(["cow", "-q"])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .map_err(unsuitable(&self.program))?;
        let taken = begun.elapsed();
        if !status.success() {
            let what = format!("nbdsnap cow {}: {status}", args[0].display());
            return Err(BenchError::Unsuitable(what));
        }
        Ok(taken)
    }

    /// A tool that is fast and wrong ends the run.
    fn compare(&self, made: &Path) -> Result<(), BenchError> {
        let open = |path| File::open(path).map_err(unsuitable(path));
        let (wanted, found) = (open(&self.snapshot)?, open(made)?);
        let len = |file: &File| file.metadata().map(|meta| meta.len());
        let bytes = len(&wanted).map_err(unsuitable(&self.snapshot))?;
        let same_length = len(&found).map_err(unsuitable(made))? == bytes;
        let (mut ours, mut theirs) = (vec![0; PIECE], vec![0; PIECE]);
        let mut at = 0;
        while same_length && at < bytes {
            wanted
                .read_exact_at(&mut ours, at)
                .map_err(unsuitable(&self.snapshot))?;
            found
                .read_exact_at(&mut theirs, at)
                .map_err(unsuitable(made))?;
            if ours != theirs {
                break;
            }
            at += PIECE as u64;
        }
        if at < bytes {
            let what = format!("{}: differs from the snapshot", made.display());
            return Err(BenchError::Unsuitable(what));
        }
        Ok(())
    }

    /// How long a verb looks at a sparse store of so many exceptions, in the page cache.
    fn looks(&self, exceptions: u64, turns: usize) -> Result<Vec<Value>, BenchError> {
        if exceptions == 0 {
            return Ok(Vec::new());
        }
        let chunk_size = chunk_size(16 << 10)?;
        let layout = Layout::new(chunk_size);
        let bytes = (layout.sectors_for(exceptions) * 512).max(100 << 30);
        let store = Target::create(&self.cow, bytes, false).map_err(refused)?;
        let mut areas = store.areas(chunk_size).map_err(refused)?;
        let chunks = (exceptions * 5 / 4).next_power_of_two();
        for n in 0..exceptions {
            // An odd factor: every chunk once.
            let old = n.wrapping_mul(0x9e37_79b1) % chunks;
            areas
                .push(Exception {
                    old: nbdsnap_format::OriginChunk(old),
                    new: layout.data_chunk(n),
                })
                .map_err(refused)?;
        }
        let header = Header {
            valid: true,
            chunk_size,
        };
        areas.finish(header, &[]).map_err(refused)?;
        store.finish().map_err(refused)?;
        let looks = ["inspect", "check"].map(|verb| -> Result<Value, BenchError> {
            let look = || self.nbdsnap(&[verb.as_ref(), self.cow.as_ref()]);
            look()?;
            let taken: Result<Vec<Duration>, BenchError> = (0..turns).map(|_| look()).collect();
            Ok((verb, taken?.iter().map(Duration::as_secs_f64).collect()))
        });
        remove(&[&self.cow]);
        looks.into_iter().collect()
    }
}

/// What was measured, and every time of it, in seconds or as a part of cp's speed.
type Value = (&'static str, Vec<f64>);

/// cp, and fsync.
fn copy(from: &Path, to: &Path) -> Result<(), BenchError> {
    let status = Command::new("cp")
        .args(["--reflink=never", "--sparse=never"])
        .args([from, to])
        .status()
        .map_err(unsuitable(Path::new("cp")))?;
    if !status.success() {
        return Err(BenchError::Unsuitable(format!("cp: {status}")));
    }
    File::open(to)
        .and_then(|file| file.sync_all())
        .map_err(unsuitable(to))
}

fn remove(paths: &[&Path]) {
    for path in paths {
        let _ = std::fs::remove_file(path);
    }
    // Nobody else's measurement is to wait for what this one left.
    rustix::fs::sync();
}

fn random_file(path: &Path, bytes: u64, rng: &mut Rng) -> Result<(), BenchError> {
    let file = File::create(path).map_err(unsuitable(path))?;
    let mut piece = vec![0; PIECE];
    for at in (0..bytes).step_by(PIECE) {
        rng.fill(&mut piece);
        file.write_all_at(&piece, at).map_err(unsuitable(path))?;
    }
    file.sync_all().map_err(unsuitable(path))
}

fn run(options: &Options) -> Result<bool, BenchError> {
    let folder = options.bench.folder()?;
    let files = Files::new(options, folder.path())?;
    files.fill(options)?;
    let tools: Vec<Tool> = match options.only {
        Some(tool) => vec![tool],
        None => Tool::ALL.to_vec(),
    };
    let mut cp = Vec::new();
    let mut seconds: Vec<Value> = tools.iter().map(|tool| (tool.name(), vec![])).collect();
    let mut speeds = seconds.clone();
    for turn in 0..options.turns {
        for (n, tool) in tools.iter().enumerate() {
            let (beside, taken) = if turn % 2 == 0 {
                let beside = files.measure(None)?;
                (beside, files.measure(Some(*tool))?)
            } else {
                let taken = files.measure(Some(*tool))?;
                (files.measure(None)?, taken)
            };
            cp.push(beside);
            seconds[n].1.push(taken);
            speeds[n].1.push(beside / taken);
        }
    }
    let looks = files.looks(options.exceptions, options.turns)?;
    let holds = speeds.iter().all(|(_, of)| spread(of)[0] >= BAR);
    if cp.len() > 1 {
        let itself = cp.windows(2).map(|two| two[0] / two[1]).collect();
        speeds.insert(0, ("cp", itself));
    }
    seconds.insert(0, ("cp", cp));
    report(options, &seconds, &speeds, &looks);
    Ok(holds || !options.check_bar)
}

/// The median, the least, the greatest.
fn spread(of: &[f64]) -> [f64; 3] {
    let mut all = of.to_vec();
    all.sort_by(f64::total_cmp);
    [all[all.len() / 2], all[0], all[all.len() - 1]]
}

fn report(options: &Options, seconds: &[Value], speeds: &[Value], looks: &[Value]) {
    if options.bench.json {
        let named = |values: &[Value]| -> serde_json::Map<_, _> {
            let pairs = values
                .iter()
                .map(|(name, of)| ((*name).to_owned(), json!(of)));
            pairs.collect()
        };
        println!(
            "{}",
            json!({"seconds": named(seconds), "of_cp": named(speeds), "looks": named(looks)})
        );
        return;
    }
    println!(
        "{} MiB in chunks of {} KiB, {} together, {}; seconds",
        options.size,
        options.chunk,
        options.run.max(1),
        if options.cached {
            "cached"
        } else {
            "not cached"
        }
    );
    for (name, of) in seconds {
        let [median, least, most] = spread(of);
        println!("{name:<8} {median:8.2} ({least:.2} to {most:.2})");
    }
    for (name, of) in speeds {
        let [median, least, most] = spread(of);
        println!("{name} has {median:.2} of cp's speed ({least:.2} to {most:.2})");
    }
    for (name, of) in looks {
        let [median, least, most] = spread(of);
        println!(
            "{name} of {} exceptions: {median:.2} s ({least:.2} to {most:.2})",
            options.exceptions
        );
    }
}
