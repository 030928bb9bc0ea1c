//! The list of exceptions of a whole store, which runs through its areas.
//! [`ListReader`] says what to read and is told what was read; the engine (to
//! open a store) and the checker find all exceptions with it. Who may simply read
//! calls [`read_list`].

use crate::area::{AreaDecoder, AreaEnd, Bounds, Exception, Exceptions, Tail};

/// The most bytes that a [`ListReader`] asks for at once: an area may be 1 GiB.
pub const MAX_READ_BYTES: u64 = 1 << 20;

/// Bytes of the store that are wanted next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListRead {
    /// Where they begin.
    pub offset: u64,
    /// How many: whole sectors, at most [`MAX_READ_BYTES`].
    pub len: usize,
}

/// How a list of exceptions ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListEnd {
    /// In an area that is not full, as it should.
    InArea {
        /// The area.
        area: u64,
        /// Exceptions in it.
        entries: u64,
        /// What lies behind them in that area.
        tail: Tail,
    },
    /// Nowhere: an area that the list needs does not lie in the store. For area
    /// 0 the store was cut off; else the areas before it are full, and the
    /// kernel refuses such a store too.
    NoArea {
        /// The area that is missing.
        area: u64,
    },
}

/// Reads the list of exceptions from its start to its end, without doing the
/// reading.
///
/// As long as [`poll_read`](Self::poll_read) wants bytes, read them and hand
/// them to [`handle_read`](Self::handle_read), which gives the exceptions in
/// them; then [`end`](Self::end) says how the list ended. As with
/// [`AreaDecoder`], it is the caller who checks each exception with
/// [`Bounds::misplaced`].
#[derive(Clone, Debug)]
pub struct ListReader {
    bounds: Bounds,
    area: u64,
    /// Exceptions in the areas before this one.
    before: u64,
    decoder: AreaDecoder,
    end: Option<ListEnd>,
}

impl ListReader {
    /// At the start of the list of a store with these bounds.
    pub const fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            area: 0,
            before: 0,
            decoder: AreaDecoder::new(bounds),
            end: if bounds.has_area(0) {
                None
            } else {
                Some(ListEnd::NoArea { area: 0 })
            },
        }
    }

    /// What to read next; nothing once the list has ended.
    pub fn poll_read(&self) -> Option<ListRead> {
        if self.end.is_some() {
            return None;
        }
        let layout = self.bounds.layout();
        let remaining = self.decoder.remaining_bytes();
        let done = layout.chunk_size().bytes() - remaining;
        Some(ListRead {
            offset: layout.area_offset(self.area) + done,
            len: remaining.min(MAX_READ_BYTES) as usize,
        })
    }

    /// The bytes that `poll_read` asked for. Gives the exceptions in them.
    /// Panics for any other number of bytes.
    pub fn handle_read<'a>(&mut self, bytes: &'a [u8]) -> Exceptions<'a> {
        let wanted = self.poll_read().map(|read| read.len);
        assert_eq!(
            wanted,
            Some(bytes.len()),
            "the bytes that poll_read asked for"
        );
        let exceptions = self.decoder.push(bytes);
        if self.decoder.remaining_bytes() == 0 {
            self.finish_area();
        }
        exceptions
    }

    /// Exceptions found so far.
    pub const fn exceptions(&self) -> u64 {
        self.before + self.decoder.exceptions()
    }

    /// How the list ended; nothing as long as there is more to read.
    pub const fn end(&self) -> Option<ListEnd> {
        self.end
    }

    fn finish_area(&mut self) {
        match self.decoder.clone().finish() {
            AreaEnd::Ended { entries, tail } => {
                let area = self.area;
                self.end = Some(ListEnd::InArea {
                    area,
                    entries,
                    tail,
                });
            }
            AreaEnd::Full => {
                self.before += self.decoder.exceptions();
                self.area += 1;
                self.decoder = AreaDecoder::new(self.bounds);
                if !self.bounds.has_area(self.area) {
                    self.end = Some(ListEnd::NoArea { area: self.area });
                }
            }
        }
    }
}

/// Read the whole list of a store with these bounds, through `read`, which fills a
/// buffer with the bytes at an offset; `each` is told every exception with its
/// number, from 0 on. Takes the memory of one piece, however long the list is.
///
/// Fails only if `read` does.
pub fn read_list<E>(
    bounds: Bounds,
    read: &mut impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    mut each: impl FnMut(u64, Exception),
) -> Result<ListEnd, E> {
    let chunk_bytes = bounds.layout().chunk_size().bytes();
    let mut buffer = vec![0; chunk_bytes.min(MAX_READ_BYTES) as usize];
    let mut list = ListReader::new(bounds);
    while let Some(wanted) = list.poll_read() {
        let piece = &mut buffer[..wanted.len];
        read(wanted.offset, piece)?;
        let first = list.exceptions();
        for (n, exception) in (first..).zip(list.handle_read(piece)) {
            each(n, exception);
        }
    }
    Ok(list.end().expect("a list that wants no bytes has ended"))
}
