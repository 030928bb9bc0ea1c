//! The data of options, decoded and checked once: lengths within lengths,
//! strings within the protocol's bounds. Borrows from the option's data and
//! allocates nothing, so that a length on the wire costs no memory.

use crate::nbd::wire::NBD_MAX_STRING;

/// What is wrong with an option's data, in words for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Malformed {
    /// Lengths that do not fit together, or a string that is none.
    Invalid(&'static str),
    /// A string longer than the protocol allows.
    TooBig(&'static str),
}

/// The data of INFO and GO.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InfoRequest<'a> {
    pub(super) name: &'a str,
    /// 16-bit information types, two bytes each.
    infos: &'a [u8],
}

impl<'a> InfoRequest<'a> {
    pub(super) fn decode(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut rest = data;
        let name = take_string(&mut rest)?;
        let count = u16::from_be_bytes(take(&mut rest)?);
        if rest.len() != usize::from(count) * 2 {
            let why = "the number of information requests does not match the option's length";
            return Err(Malformed::Invalid(why));
        }
        Ok(Self { name, infos: rest })
    }

    pub(super) fn asks_for(&self, info: u16) -> bool {
        let (infos, _) = self.infos.as_chunks::<2>();
        infos.contains(&info.to_be_bytes())
    }
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MetaRequest<'a> {
    pub(super) export: &'a str,
    /// Pairs of length and string, all checked.
    queries: &'a [u8],
}

impl<'a> MetaRequest<'a> {
    pub(super) fn decode(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut rest = data;
        let export = take_string(&mut rest)?;
        let count = u32::from_be_bytes(take(&mut rest)?);
        let queries = rest;
        // Each query takes at least 4 bytes, so this ends with the data.
        for _ in 0..count {
            take_string(&mut rest)?;
        }
        if !rest.is_empty() {
            return Err(Malformed::Invalid("bytes follow the last query"));
        }
        Ok(Self { export, queries })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queries.is_empty()
    }

    pub(super) fn queries(&self) -> impl Iterator<Item = &'a str> {
        let mut rest = self.queries;
        std::iter::from_fn(move || take_string(&mut rest).ok())
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], Malformed> {
    let (field, left) = rest
        .split_first_chunk::<N>()
        .ok_or(Malformed::Invalid("the option's data is too short"))?;
    *rest = left;
    Ok(*field)
}

/// A 32-bit length and that many bytes of UTF-8 without NUL.
fn take_string<'a>(rest: &mut &'a [u8]) -> Result<&'a str, Malformed> {
    let len = u32::from_be_bytes(take(rest)?) as usize;
    let (bytes, left) = rest
        .split_at_checked(len)
        .ok_or(Malformed::Invalid("a string is longer than the option"))?;
    if len > NBD_MAX_STRING {
        return Err(Malformed::TooBig("a string is longer than 4096 bytes"));
    }
    let text = std::str::from_utf8(bytes)
        .map_err(|_| Malformed::Invalid("a string is not valid UTF-8"))?;
    if text.contains('\0') {
        return Err(Malformed::Invalid("a string contains a NUL character"));
    }
    *rest = left;
    Ok(text)
}
