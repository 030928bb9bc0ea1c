//! NBD URIs (doc/uri.md of <https://github.com/NetworkBlockDevice/nbd>) and the
//! addresses that a server listens at. Parsed from the command line, printed
//! for the operator to paste into a client: what is printed parses back to itself.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

use super::wire::NBD_DEFAULT_PORT;

/// Where a server listens and a client connects: `HOST:PORT` or `unix:PATH`.
/// Parsing takes an NBD URI as well.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ListenAddr {
    /// TCP.
    Tcp {
        /// A name or address; an IPv6 address stands here without brackets.
        host: String,
        /// 0 lets the system choose one, when listening.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// An export of an NBD server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NbdUri {
    /// The server.
    pub address: ListenAddr,
    /// The export; empty for the default export.
    pub export: String,
}

/// Why a text is no address or NBD URI.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// Neither of the three forms.
    #[error("{0:?} is no address: write HOST:PORT, [IPV6]:PORT, unix:PATH or an NBD URI")]
    NotAnAddress(String),
    /// A URI, but none of NBD.
    #[error("{0:?} is no NBD URI: it begins with nbd:// or nbd+unix://")]
    NotNbd(String),
    /// nbds: or a parameter about TLS.
    #[error("{0:?} asks for TLS, which is not supported yet: use nbd:// or nbd+unix://")]
    Tls(String),
    /// A port that is no number up to 65535.
    #[error("port {0:?} is no number from 0 to 65535")]
    Port(String),
    /// `%` without two hexadecimal digits.
    #[error("{0:?} contains a % that is not followed by two hexadecimal digits")]
    Percent(String),
    /// The name or host is not UTF-8, or holds a NUL.
    #[error("{0:?} decodes to bytes that are not a valid name (UTF-8 without NUL)")]
    NotText(String),
    /// `nbd+unix` without `socket=`.
    #[error("{0:?} names no socket: write nbd+unix:///EXPORT?socket=PATH")]
    NoSocket(String),
    /// A host in `nbd+unix://HOST/`.
    #[error("{0:?} has a host, but a Unix socket has none: write nbd+unix:///EXPORT?socket=PATH")]
    HostOfUnix(String),
    /// A query parameter we do not know.
    #[error("{uri:?} has the parameter {parameter:?}, which is not known here")]
    Parameter {
        /// The URI.
        uri: String,
        /// The parameter.
        parameter: String,
    },
    /// An export where only an address makes sense.
    #[error("{0:?} names an export, but a server listens for all of them: leave it out")]
    ExportInAddress(String),
}

impl ListenAddr {
    /// The URI of an export there.
    pub fn uri(&self, export: &str) -> NbdUri {
        NbdUri {
            address: self.clone(),
            export: export.to_owned(),
        }
    }
}

impl FromStr for ListenAddr {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        if text.contains("://") {
            let uri: NbdUri = text.parse()?;
            return if uri.export.is_empty() {
                Ok(uri.address)
            } else {
                Err(UriError::ExportInAddress(text.to_owned()))
            };
        }
        let not_an_address = || UriError::NotAnAddress(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() || path.contains('\0') {
                Err(not_an_address())
            } else {
                Ok(Self::Unix(path.into()))
            };
        }
        match split_host_port(text).ok_or_else(not_an_address)? {
            (host, Some(port)) if !host.is_empty() => Ok(Self::Tcp {
                host: host.to_owned(),
                port: parse_port(port)?,
            }),
            _ => Err(not_an_address()),
        }
    }
}

impl FromStr for NbdUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let whole = || text.to_owned();
        let (scheme, rest) = text
            .split_once("://")
            .ok_or_else(|| UriError::NotNbd(whole()))?;
        if rest.contains('#') {
            return Err(UriError::NotNbd(whole()));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let socket = socket_parameter(text, query)?;
        let address = match scheme.to_ascii_lowercase().as_str() {
            "nbd" if socket.is_none() => tcp_address(text, authority)?,
            "nbd" => {
                let (uri, parameter) = (whole(), "socket".to_owned());
                return Err(UriError::Parameter { uri, parameter });
            }
            "nbd+unix" if authority.is_empty() => {
                ListenAddr::Unix(socket.ok_or_else(|| UriError::NoSocket(whole()))?)
            }
            "nbd+unix" => return Err(UriError::HostOfUnix(whole())),
            "nbds" | "nbds+unix" => return Err(UriError::Tls(whole())),
            _ => return Err(UriError::NotNbd(whole())),
        };
        let export = decode_text(text, path)?;
        Ok(Self { address, export })
    }
}

fn tcp_address(uri: &str, authority: &str) -> Result<ListenAddr, UriError> {
    // A user name is for TLS alone, so it means nothing here.
    let place = authority.rsplit_once('@').map_or(authority, |(_, p)| p);
    let (host, port) =
        split_host_port(place).ok_or_else(|| UriError::NotAnAddress(uri.to_owned()))?;
    let host = match host {
        "" => "localhost".to_owned(),
        host => decode_text(uri, host)?,
    };
    let port = match port {
        None | Some("") => NBD_DEFAULT_PORT,
        Some(port) => parse_port(port)?,
    };
    Ok(ListenAddr::Tcp { host, port })
}

/// The path in `socket=`, and a refusal of what is not known.
fn socket_parameter(uri: &str, query: &str) -> Result<Option<PathBuf>, UriError> {
    let mut socket = None;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        match key {
            "socket" => {
                let path = percent_decode(value).ok_or_else(|| UriError::Percent(uri.into()))?;
                if path.is_empty() {
                    return Err(UriError::NoSocket(uri.to_owned()));
                }
                if path.contains(&0) {
                    return Err(UriError::NotText(uri.to_owned()));
                }
                socket = Some(OsString::from_vec(path).into());
            }
            key if key.starts_with("tls-") => return Err(UriError::Tls(uri.to_owned())),
            key if key.starts_with("x-") => {}
            key => {
                return Err(UriError::Parameter {
                    uri: uri.to_owned(),
                    parameter: key.to_owned(),
                });
            }
        }
    }
    Ok(socket)
}

/// Splits `HOST`, `HOST:PORT`, `[V6]` or `[V6]:PORT`; the host comes without
/// its brackets. An IPv6 address without brackets is ambiguous, so it is none.
fn split_host_port(text: &str) -> Option<(&str, Option<&str>)> {
    let (host, rest) = match text.strip_prefix('[') {
        Some(inner) => {
            let (host, rest) = inner.split_once(']')?;
            (!host.is_empty()).then_some((host, rest))?
        }
        None => text.split_at(text.find(':').unwrap_or(text.len())),
    };
    match rest.strip_prefix(':') {
        Some(port) if port.contains(':') => None,
        Some(port) => Some((host, Some(port))),
        None if rest.is_empty() => Some((host, None)),
        None => None,
    }
}

fn parse_port(port: &str) -> Result<u16, UriError> {
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let number = digits.then(|| port.parse().ok()).flatten();
    number.ok_or_else(|| UriError::Port(port.to_owned()))
}

fn decode_text(uri: &str, part: &str) -> Result<String, UriError> {
    let bytes = percent_decode(part).ok_or_else(|| UriError::Percent(uri.to_owned()))?;
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(UriError::NotText(uri.to_owned())),
    }
}

fn percent_decode(text: &str) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, left)) = rest.split_first() {
        rest = left;
        if byte == b'%' {
            let (digits, left) = rest.split_first_chunk::<2>()?;
            let high = char::from(digits[0]).to_digit(16)?;
            let low = char::from(digits[1]).to_digit(16)?;
            decoded.push((high * 16 + low) as u8);
            rest = left;
        } else {
            decoded.push(byte);
        }
    }
    Some(decoded)
}

/// Writes `bytes` with everything encoded that a URI, a shell or a list of
/// parameters could take for its own; `keep` stays as it is.
fn percent_encode(f: &mut fmt::Formatter<'_>, bytes: &[u8], keep: &[u8]) -> fmt::Result {
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || keep.contains(&byte) {
            write!(f, "{}", char::from(byte))?;
        } else {
            write!(f, "%{byte:02X}")?;
        }
    }
    Ok(())
}

/// `HOST:PORT` or `unix:PATH`.
impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = self.export.as_bytes();
        match &self.address {
            ListenAddr::Tcp { host, port } => {
                f.write_str("nbd://")?;
                if host.contains(':') {
                    f.write_str("[")?;
                    percent_encode(f, host.as_bytes(), b":")?;
                    f.write_str("]")?;
                } else {
                    percent_encode(f, host.as_bytes(), b"")?;
                }
                if *port != NBD_DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
                f.write_str("/")?;
                percent_encode(f, export, b"/:@")
            }
            ListenAddr::Unix(path) => {
                f.write_str("nbd+unix:///")?;
                percent_encode(f, export, b"/:@")?;
                f.write_str("?socket=")?;
                percent_encode(f, path.as_os_str().as_bytes(), b"/:@")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Refusal = fn(String) -> UriError;

    fn tcp(host: &str, port: u16) -> ListenAddr {
        let host = host.to_owned();
        ListenAddr::Tcp { host, port }
    }

    #[test]
    fn uris_of_the_specification() {
        let sock = || ListenAddr::Unix("sock".into());
        for (text, address, export) in [
            ("nbd://example.com/disk", tcp("example.com", 10809), "disk"),
            ("nbd+unix:///disk?socket=sock", sock(), "disk"),
            ("nbd://example.com/", tcp("example.com", 10809), ""),
            ("nbd://example.com", tcp("example.com", 10809), ""),
            (
                "nbd://example.com//disk",
                tcp("example.com", 10809),
                "/disk",
            ),
            (
                "nbd://example.com/hello%20world",
                tcp("example.com", 10809),
                "hello world",
            ),
        ] {
            let export = export.to_owned();
            assert_eq!(text.parse(), Ok(NbdUri { address, export }), "{text}");
        }
    }

    #[test]
    fn uris_with_ports_brackets_users_and_parameters() {
        let parse = |text: &str| text.parse::<NbdUri>().unwrap();
        assert_eq!(parse("nbd://[::1]:99/a").address, tcp("::1", 99));
        assert_eq!(
            parse("NBD://[fe80::1%25eth0]/").address,
            tcp("fe80::1%eth0", 10809)
        );
        assert_eq!(parse("nbd://me@host:/x").address, tcp("host", 10809));
        assert_eq!(parse("nbd://").address, tcp("localhost", 10809));
        let uri = parse("nbd+unix:///disk@mon?x-a=b&socket=/run/a%20b+c&x-c");
        assert_eq!(uri.address, ListenAddr::Unix("/run/a b+c".into()));
        assert_eq!(uri.export, "disk@mon");
        assert_eq!(
            parse("nbd+unix://?socket=s").address,
            ListenAddr::Unix("s".into())
        );
    }

    #[test]
    fn what_is_printed() {
        let print = |address: ListenAddr, export| address.uri(export).to_string();
        assert_eq!(print(tcp("::1", 10809), "disk@mon"), "nbd://[::1]/disk@mon");
        assert_eq!(print(tcp("h", 1), "a b?#é"), "nbd://h:1/a%20b%3F%23%C3%A9");
        assert_eq!(
            print(ListenAddr::Unix("/tmp/a&b".into()), ""),
            "nbd+unix:///?socket=/tmp/a%26b"
        );
        assert_eq!(tcp("::1", 1).to_string(), "[::1]:1");
    }

    #[test]
    fn listen_addresses() {
        for (text, address) in [
            ("127.0.0.1:10809", tcp("127.0.0.1", 10809)),
            ("[::]:0", tcp("::", 0)),
            ("localhost:1", tcp("localhost", 1)),
            ("unix:/tmp/s", ListenAddr::Unix("/tmp/s".into())),
            ("unix:a:b", ListenAddr::Unix("a:b".into())),
            ("nbd://0.0.0.0", tcp("0.0.0.0", 10809)),
            ("nbd+unix:///?socket=/s", ListenAddr::Unix("/s".into())),
        ] {
            assert_eq!(text.parse(), Ok(address), "{text}");
        }
        for text in [
            "", "host", ":1", "::1:1", "[::1]", "[]:1", "[::1]x:1", "unix:", "a:1:2",
        ] {
            let refused = text.parse::<ListenAddr>();
            assert_eq!(refused, Err(UriError::NotAnAddress(text.into())));
        }
        for port in ["", "65536", "-1", "+1", "http"] {
            let refused = format!("host:{port}").parse::<ListenAddr>();
            assert_eq!(refused, Err(UriError::Port(port.into())));
        }
        let text = "nbd://host/disk".to_owned();
        assert_eq!(
            text.parse::<ListenAddr>(),
            Err(UriError::ExportInAddress(text))
        );
    }

    #[test]
    fn refused_uris_say_why() {
        for text in [
            "nbds://host/",
            "nbds+unix:///?socket=s",
            "nbd://h/?tls-type=psk",
        ] {
            let message = text.parse::<NbdUri>().unwrap_err().to_string();
            assert!(
                message.contains("TLS, which is not supported yet"),
                "{message}"
            );
        }
        let cases: [(&str, Refusal); 11] = [
            ("http://host/", UriError::NotNbd),
            ("nbd:unix:sock", UriError::NotNbd),
            ("nbd://h/a#b", UriError::NotNbd),
            ("nbd+unix:///x", UriError::NoSocket),
            ("nbd+unix:///x?socket=", UriError::NoSocket),
            ("nbd+unix://h/x?socket=s", UriError::HostOfUnix),
            ("nbd://h/%", UriError::Percent),
            ("nbd://h/%4", UriError::Percent),
            ("nbd://h/%zz", UriError::Percent),
            ("nbd://h/%ff", UriError::NotText),
            ("nbd+unix:///?socket=%00/abstract", UriError::NotText),
        ];
        for (text, error) in cases {
            assert_eq!(text.parse::<NbdUri>(), Err(error(text.to_owned())));
        }
        for (uri, parameter) in [("nbd://h/?a=b", "a"), ("nbd://h/?socket=s", "socket")] {
            let (uri, parameter) = (uri.to_owned(), parameter.to_owned());
            let refused = uri.parse::<NbdUri>();
            assert_eq!(refused, Err(UriError::Parameter { uri, parameter }));
        }
    }

    proptest! {
        #[test]
        fn printed_uris_parse_back(
            export in "[^\0]{0,40}",
            path in prop::collection::vec(1u8.., 1..40),
            port: u16,
            host in "[a-z0-9.-]{1,20}|[0-9a-f:]{1,10}:[0-9a-f]{1,4}",
        ) {
            for address in [
                ListenAddr::Unix(OsString::from_vec(path.clone()).into()),
                tcp(&host, port),
            ] {
                let uri = address.uri(&export);
                prop_assert_eq!(uri.to_string().parse(), Ok(uri));
            }
        }

        #[test]
        fn arbitrary_text_never_panics(text in ".{0,60}", tail in ".{0,60}") {
            let _ = text.parse::<ListenAddr>();
            let _ = format!("nbd://{tail}").parse::<ListenAddr>();
            let _ = format!("nbd+unix://{tail}?socket={text}").parse::<NbdUri>();
        }
    }
}
