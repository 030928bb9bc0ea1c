//! The loop: keeps `depth` requests in flight on one connection, sends new ones
//! together in one write, takes replies in large reads, and measures.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use nbdsnap::nbd::wire::REQUEST_BYTES;

use crate::BenchError;
use crate::connection::{Connection, Outgoing, TransportError};
use crate::content::{Content, Stamp};
use crate::cpu::{cpu_time, machine_time};
use crate::plan::{Order, Plan};
use crate::replies::{Command, InFlight, ReplyParser};

/// Bytes taken from the socket at once: some replies, not all of a deep queue,
/// so that new requests go out while the server works on the rest.
const RECEIVE_BYTES: usize = 64 << 10;
/// Bytes of requests that are prepared before the socket has to take some.
const SEND_AHEAD_BYTES: usize = 256 << 10;

/// What to do and for how long.
#[derive(Clone, Debug)]
pub struct Load {
    /// Read or write.
    pub command: Command,
    /// Which blocks.
    pub order: Order,
    /// Bytes of a request.
    pub block: u32,
    /// Bytes from one block to the next; at least `block`.
    pub stride: u64,
    /// Requests in flight.
    pub depth: u16,
    /// New requests are sent when so many can be sent together; at most `depth`.
    pub batch: u16,
    /// When it ends.
    pub limit: Limit,
    /// Chooses the blocks, and the bytes that are written.
    pub seed: u64,
    /// Process whose CPU time is measured.
    pub server_pid: Option<u32>,
}

/// When a load ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Measured for a time, after a time that is not.
    Time {
        /// Not measured.
        warm_up: Duration,
        /// Measured.
        measure: Duration,
    },
    /// So many requests, measured from the first to the last reply.
    Count(u64),
    /// Every block that the plan has; for [`Order::Once`].
    WholePlan,
}

/// What was measured, and for writes, what was written.
pub type Outcome = (Measured, Option<Written>);

/// What was measured.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Requests answered.
    pub operations: u64,
    /// Bytes of a request.
    pub block: u32,
    /// How long that took.
    pub elapsed: Duration,
    /// From a request's place in the send buffer to the read with the end of its reply, in ns.
    pub latency: Histogram<u64>,
    /// The server's CPU time meanwhile; `None` if it was not asked for or the process ended.
    pub server_cpu: Option<Duration>,
    /// The part of the time in which the generator had nothing to do, from 0 to
    /// 1. Near 0, the generator is the limit, and not the server.
    pub idle: f64,
    /// The part of the machine's processors that neither the server nor the
    /// generator used, but others, from 0 to 1. Where it is not near 0, the
    /// numbers are worth little. `None` if the server's CPU time is not known.
    pub others: Option<f64>,
}

impl Measured {
    /// Operations a second.
    pub fn iops(&self) -> f64 {
        self.operations as f64 / self.elapsed.as_secs_f64()
    }

    /// Bytes a second.
    pub fn bytes_per_second(&self) -> f64 {
        self.iops() * f64::from(self.block)
    }

    /// A quantile of the latency in us.
    pub fn latency_us(&self, quantile: f64) -> f64 {
        self.latency.value_at_quantile(quantile) as f64 / 1e3
    }

    /// Server CPU time for one operation in us.
    pub fn server_cpu_us(&self) -> Option<f64> {
        let cpu = self.server_cpu?;
        (self.operations > 0).then(|| cpu.as_secs_f64() * 1e6 / self.operations as f64)
    }
}

/// The strides whose block was written, to be read back.
#[derive(Clone, Debug)]
pub struct Written {
    places: Vec<bool>,
    stride: u64,
    block: u32,
    stamp: Stamp,
}

impl Written {
    /// Blocks written at least once.
    pub fn blocks(&self) -> u64 {
        self.places.iter().filter(|&&written| written).count() as u64
    }

    /// Reads every written block from an export and compares it.
    pub fn verify(&self, connection: &mut Connection) -> Result<(), BenchError> {
        let ascending = (0..self.places.len() as u32).filter(|&place| self.places[place as usize]);
        let plan = Plan::of_places(self.stride, ascending);
        let content = Content::Stamped(self.stamp.clone());
        let depth = (32 * 4096 / self.block).clamp(2, 32) as u16;
        let running = Running::new(connection, plan, &content, None, (depth, 1), self.block);
        running.run(Limit::WholePlan, None).map(|_| ())
    }
}

impl Load {
    /// Runs it. Reads are compared with `content`; what is written are the
    /// stamps of the seed, whatever `content` is.
    pub fn run(
        &self,
        connection: &mut Connection,
        content: &Content,
    ) -> Result<Outcome, BenchError> {
        self.check_export(connection, content)?;
        let plan = Plan::new(
            self.order,
            connection.bytes(),
            self.block,
            self.stride,
            self.seed,
        )?;
        let written = (self.command == Command::Write).then(|| Written {
            places: vec![false; plan.places() as usize],
            stride: self.stride,
            block: self.block,
            stamp: Stamp::new(self.seed),
        });
        Running::new(
            connection,
            plan,
            content,
            written,
            (self.depth, self.batch),
            self.block,
        )
        .run(self.limit, self.server_pid)
    }

    fn check_export(&self, connection: &Connection, content: &Content) -> Result<(), BenchError> {
        let refuse = |reason: String| Err(BenchError::Unsuitable(reason));
        let bytes = connection.bytes();
        match (self.command, content.len_bytes()) {
            (Command::Write, _) if connection.is_read_only() => {
                return refuse("the export is read-only".into());
            }
            (Command::Write, _)
                if !self.block.is_multiple_of(512) || !self.stride.is_multiple_of(512) =>
            {
                return refuse(
                    "blocks that are written, and their stride, are multiples of 512 bytes".into(),
                );
            }
            (Command::Read, Some(known)) if known != bytes => {
                return refuse(format!(
                    "the export has {bytes} bytes, the file to compare with {known}"
                ));
            }
            _ => {}
        }
        if self.depth == 0 || self.batch > self.depth {
            return refuse(
                "at least one request is in flight, and at most all are sent together".into(),
            );
        }
        if self.order != Order::Once && self.limit == Limit::WholePlan {
            return refuse("this load has no end of its own: give a time or a count".into());
        }
        Ok(())
    }
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Until then, nothing is measured.
    WarmingUp(Instant),
    /// Until then, if there is an end in time.
    Measuring(Option<Instant>),
    /// Measured; no new requests.
    Draining,
}

/// A load that runs.
struct Running<'a> {
    connection: &'a mut Connection,
    plan: Plan,
    content: &'a Content,
    /// Present for writes.
    written: Option<Written>,
    block: u32,
    batch: usize,
    in_flight: InFlight,
    parser: ReplyParser,
    outgoing: Outgoing,
    /// Requests that may still be sent.
    remaining: u64,
    latency: Histogram<u64>,
}

/// Clocks at the start of the measurement.
struct Start {
    at: Instant,
    waited: Duration,
    cpu: Option<CpuTimes>,
}

/// CPU times up to some instant.
#[derive(Clone, Copy)]
struct CpuTimes {
    server: Duration,
    generator: Duration,
    machine: Duration,
}

impl CpuTimes {
    fn read(server_pid: u32) -> Option<Self> {
        Some(Self {
            server: cpu_time(server_pid)?,
            generator: cpu_time(std::process::id())?,
            machine: machine_time()?,
        })
    }

    fn since(self, earlier: Self) -> Self {
        Self {
            server: self.server.saturating_sub(earlier.server),
            generator: self.generator.saturating_sub(earlier.generator),
            machine: self.machine.saturating_sub(earlier.machine),
        }
    }

    /// The part of the machine that others used within `elapsed`.
    fn others(self, elapsed: Duration) -> f64 {
        let processors = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        let others = self.machine.saturating_sub(self.server + self.generator);
        others.as_secs_f64() / (elapsed.as_secs_f64().max(1e-9) * processors)
    }
}

impl<'a> Running<'a> {
    fn new(
        connection: &'a mut Connection,
        plan: Plan,
        content: &'a Content,
        written: Option<Written>,
        (depth, batch): (u16, u16),
        block: u32,
    ) -> Self {
        Self {
            connection,
            plan,
            content,
            written,
            block,
            batch: usize::from(batch),
            in_flight: InFlight::new(depth),
            parser: ReplyParser::default(),
            outgoing: Outgoing::default(),
            remaining: u64::MAX,
            latency: Histogram::new_with_bounds(1, 3_600_000_000_000, 3)
                .expect("these bounds are allowed"),
        }
    }

    fn run(mut self, limit: Limit, server_pid: Option<u32>) -> Result<Outcome, BenchError> {
        let mut buffer = vec![0; RECEIVE_BYTES];
        let mut now = Instant::now();
        let mut phase = match limit {
            Limit::Time { warm_up, .. } => Phase::WarmingUp(now + warm_up),
            Limit::Count(_) | Limit::WholePlan => Phase::Measuring(None),
        };
        if let Limit::Count(count) = limit {
            self.remaining = count;
        }
        let mut start = self.start(now, server_pid);
        let mut measured = None;
        loop {
            match phase {
                Phase::WarmingUp(until) if now >= until => {
                    self.latency.reset();
                    start = self.start(now, server_pid);
                    let Limit::Time { measure, .. } = limit else {
                        unreachable!("only a time has a warm-up")
                    };
                    phase = Phase::Measuring(Some(now + measure));
                }
                Phase::Measuring(Some(until)) if now >= until => {
                    measured = Some(self.measured(&start, now, server_pid));
                    self.remaining = 0;
                    phase = Phase::Draining;
                }
                _ => {}
            }
            self.submit(now);
            if self.in_flight.is_empty() {
                break;
            }
            let received = self.exchange(&mut buffer)?;
            now = Instant::now();
            self.take(&buffer[..received], now)?;
        }
        let measured = measured.unwrap_or_else(|| self.measured(&start, now, server_pid));
        Ok((measured, self.written))
    }

    fn start(&self, at: Instant, server_pid: Option<u32>) -> Start {
        Start {
            at,
            waited: self.connection.transport.waited(),
            cpu: server_pid.and_then(CpuTimes::read),
        }
    }

    fn measured(&self, start: &Start, end: Instant, server_pid: Option<u32>) -> Measured {
        let elapsed = end - start.at;
        let waited = self
            .connection
            .transport
            .waited()
            .saturating_sub(start.waited);
        let cpu = server_pid
            .and_then(CpuTimes::read)
            .zip(start.cpu)
            .map(|(after, before)| after.since(before));
        Measured {
            operations: self.latency.len(),
            block: self.block,
            elapsed,
            latency: self.latency.clone(),
            server_cpu: cpu.map(|cpu| cpu.server),
            others: cpu.map(|cpu| cpu.others(elapsed)),
            idle: waited.as_secs_f64() / elapsed.as_secs_f64().max(1e-9),
        }
    }

    /// Puts as many requests into the send buffer as there is room for.
    /// Waits until there is room for a batch.
    fn submit(&mut self, now: Instant) {
        if self.outgoing.is_empty() && self.in_flight.room() < self.batch {
            return;
        }
        while self.remaining > 0
            && self.in_flight.room() > 0
            && self.outgoing.len() < SEND_AHEAD_BYTES
        {
            let Some(offset) = self.plan.next_offset() else {
                self.remaining = 0;
                return;
            };
            self.remaining -= 1;
            let out = &mut self.outgoing.bytes;
            if let Some(written) = &self.written {
                out.reserve(REQUEST_BYTES + self.block as usize);
                self.in_flight
                    .begin(Command::Write, offset, self.block, now, out);
                written.stamp.append(offset, self.block as usize, out);
            } else {
                self.in_flight
                    .begin(Command::Read, offset, self.block, now, out);
            }
        }
    }

    fn exchange(&mut self, buffer: &mut [u8]) -> Result<usize, BenchError> {
        let transport = &mut self.connection.transport;
        transport
            .send(&mut self.outgoing)
            .and_then(|()| transport.receive(buffer, &mut self.outgoing))
            .map_err(|error| match error {
                TransportError::Broken(cause) => BenchError::Connection {
                    in_flight: self.in_flight.len(),
                    cause,
                },
                TransportError::Silent(waited) => BenchError::Silence {
                    seconds: waited.as_secs(),
                    in_flight: self.in_flight.len(),
                },
            })
    }

    fn take(&mut self, received: &[u8], now: Instant) -> Result<(), BenchError> {
        let (latency, written) = (&mut self.latency, &mut self.written);
        self.parser
            .feed(received, &mut self.in_flight, self.content, |finished| {
                latency.saturating_record((now - finished.since).as_nanos() as u64);
                if let Some(written) = written {
                    written.places[(finished.offset / written.stride) as usize] = true;
                }
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answerer::answer;
    use crate::plan::Rng;

    const BYTES: usize = 1 << 20;

    fn random_image() -> Vec<u8> {
        let mut image = vec![0; BYTES];
        Rng::new(9).fill(&mut image);
        image
    }

    fn load(command: Command, order: Order, limit: Limit) -> Load {
        Load {
            command,
            order,
            block: 4096,
            stride: 4096,
            depth: 32,
            batch: 8,
            limit,
            seed: 5,
            server_pid: None,
        }
    }

    /// Runs a load against an image in memory; what was measured, and the image afterwards.
    fn run(
        load: &Load,
        image: Vec<u8>,
        content: &Content,
    ) -> (Result<Outcome, BenchError>, Vec<u8>) {
        let (stream, server) = answer(image).unwrap();
        let mut connection = Connection::over(stream, true).unwrap();
        let result = load
            .run(&mut connection, content)
            .and_then(|(measured, written)| {
                if let Some(written) = &written {
                    written.verify(&mut connection)?;
                }
                Ok((measured, written))
            });
        // After a failure, replies are still on their way: no time for a goodbye.
        if result.is_ok() {
            connection.close().unwrap();
        } else {
            drop(connection);
        }
        (result, server.join().unwrap().unwrap())
    }

    #[test]
    fn reads_are_counted_and_compared() {
        let content = Content::Image(random_image());
        let all = load(Command::Read, Order::Once, Limit::WholePlan);
        let (result, _) = run(&all, random_image(), &content);
        assert_eq!(result.unwrap().0.operations, 256);
        let counted = load(Command::Read, Order::Random, Limit::Count(1000));
        let (result, _) = run(&counted, random_image(), &content);
        let (measured, written) = result.unwrap();
        assert_eq!((measured.operations, measured.latency.len()), (1000, 1000));
        assert!(written.is_none() && measured.iops() > 0.0);
    }

    #[test]
    fn one_wrong_byte_on_the_disk_is_found() {
        let mut image = random_image();
        image[777_777] ^= 0x10;
        let all = load(Command::Read, Order::Once, Limit::WholePlan);
        let (result, _) = run(&all, image, &Content::Image(random_image()));
        assert!(
            matches!(result, Err(BenchError::WrongData { at: 777_777, .. })),
            "{result:?}"
        );
    }

    #[test]
    fn first_writes_reach_every_block_and_are_read_back() {
        let mut first_writes = load(Command::Write, Order::Once, Limit::WholePlan);
        first_writes.stride = 65536;
        let (result, image) = run(&first_writes, random_image(), &Content::Unchecked);
        let (measured, written) = result.unwrap();
        assert_eq!((measured.operations, written.unwrap().blocks()), (16, 16));
        let (before, stamps) = (random_image(), Content::Stamped(Stamp::new(5)));
        for chunk in 0..16 {
            let at = chunk * 65536;
            stamps.check(at as u64, &image[at..at + 4096]).unwrap();
            assert_eq!(image[at + 4096..at + 65536], before[at + 4096..at + 65536]);
        }
    }

    #[test]
    fn large_writes_go_out_piece_by_piece() {
        let mut large = load(Command::Write, Order::Sequential, Limit::Count(20));
        large.block = 512 << 10;
        large.stride = 512 << 10;
        let (result, image) = run(&large, random_image(), &Content::Unchecked);
        assert_eq!(result.unwrap().1.unwrap().blocks(), 2);
        Content::Stamped(Stamp::new(5)).check(0, &image).unwrap();
    }

    #[test]
    fn a_time_has_a_warm_up_and_an_end() {
        let limit = Limit::Time {
            warm_up: Duration::from_millis(5),
            measure: Duration::from_millis(20),
        };
        let timed = load(Command::Read, Order::Random, limit);
        let (result, _) = run(&timed, random_image(), &Content::Image(random_image()));
        let measured = result.unwrap().0;
        assert!(measured.elapsed >= Duration::from_millis(20) && measured.operations > 0);
    }

    #[test]
    fn loads_that_make_no_sense_are_refused() {
        let refused = |load: Load, content: &Content| {
            let (result, _) = run(&load, random_image(), content);
            assert!(
                matches!(result, Err(BenchError::Unsuitable(_))),
                "{result:?}"
            );
        };
        let endless = load(Command::Read, Order::Random, Limit::WholePlan);
        refused(endless.clone(), &Content::Unchecked);
        let once = Load {
            order: Order::Once,
            ..endless
        };
        refused(once.clone(), &Content::Image(vec![0; BYTES - 1]));
        refused(
            Load {
                depth: 0,
                ..once.clone()
            },
            &Content::Unchecked,
        );
        refused(
            Load {
                block: 1000,
                stride: 1000,
                command: Command::Write,
                ..once
            },
            &Content::Unchecked,
        );
    }
}
