//! `ls --tree`: what stands on what, drawn as dmsetup draws it.

use super::session::{Device, Session, Step, beside_the_point};
use super::show::block_name;
use crate::control::dm::{DmAnswer, DmDep, DmInfo, DmOrder};

/// Columns of a page, where output goes to no terminal.
const PAGE: usize = 80;
/// Deeper nodes are left out.
const DEEPEST: usize = 98;

/// The lines between nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lines {
    branch: &'static str,
    along: &'static str,
    last: &'static str,
    only: &'static str,
    first: &'static str,
}

const ASCII: Lines = Lines {
    branch: "|-",
    along: "| ",
    last: "`-",
    only: "---",
    first: "-+-",
};
const UTF: Lines = Lines {
    branch: "├─",
    along: "│ ",
    last: "└─",
    only: "───",
    first: "─┬─",
};
const VT100: Lines = Lines {
    branch: "\x1b(0\x0ftq\x1b(B",
    along: "\x1b(0\x0fx\x1b(B ",
    last: "\x1b(0\x0fmq\x1b(B",
    only: "\x1b(0\x0fqqq\x1b(B",
    first: "\x1b(0\x0fqwq\x1b(B",
};

/// How the tree is drawn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    lines: Lines,
    has_numbers: bool,
    has_block_names: bool,
    is_active: bool,
    has_open: bool,
    has_uuid: bool,
    has_mode: bool,
    is_inverted: bool,
    is_compact: bool,
    /// Columns of a line, unless it may be as long as it is.
    width: Option<usize>,
}

impl Style {
    /// As `--options` wants it; each can be shortened.
    pub(super) fn of(session: &Session<'_>) -> Result<Self, String> {
        let lines = if session.world.speaks_utf8() {
            UTF
        } else {
            ASCII
        };
        let columns = session.world.width().filter(|width| *width > 3);
        let mut style = Self {
            lines,
            has_numbers: true,
            has_block_names: false,
            is_active: false,
            has_open: false,
            has_uuid: false,
            has_mode: false,
            is_inverted: false,
            is_compact: false,
            width: Some(columns.map_or(PAGE, |width| width - 3)),
        };
        let options = session.switches.options.as_deref().unwrap_or_default();
        for option in options.split(',').filter(|option| !option.is_empty()) {
            style.take(option)?;
        }
        if style.lines == VT100 {
            style.width = style.width.map(|_| PAGE);
        }
        Ok(style)
    }

    fn take(&mut self, option: &str) -> Result<(), String> {
        let is = |name: &str| name.starts_with(option);
        if is("device") {
            self.has_numbers = true;
        } else if is("blkdevname") {
            self.has_block_names = true;
        } else if is("nodevice") {
            self.has_numbers = false;
        } else if is("status") || is("table") {
            // dmsetup takes them, and shows nothing for them.
        } else if is("active") {
            self.is_active = true;
        } else if is("open") {
            self.has_open = true;
        } else if is("uuid") {
            self.has_uuid = true;
        } else if is("rw") {
            self.has_mode = true;
        } else if is("utf") {
            self.lines = UTF;
        } else if is("vt100") {
            self.lines = VT100;
        } else if is("ascii") {
            self.lines = ASCII;
        } else if is("inverted") {
            self.is_inverted = true;
        } else if is("compact") {
            self.is_compact = true;
        } else if is("notrunc") {
            self.width = None;
        } else {
            return Err(format!("Tree options not recognised: {option}."));
        }
        Ok(())
    }

    /// Several nodes on a line.
    fn is_compact(&self) -> bool {
        let has_attributes = self.is_active || self.has_open || self.has_uuid || self.has_mode;
        self.is_compact && !has_attributes
    }
}

/// A device, or what one stands on.
#[derive(Debug)]
struct Node {
    what: DmDep,
    info: Option<DmInfo>,
    below: Vec<usize>,
    above: Vec<usize>,
}

/// Draw all devices.
pub(super) fn show(session: &mut Session<'_>) -> Step {
    let Ok(style) = Style::of(session) else {
        return session.stop("Couldn't process command line.");
    };
    let nodes = nodes(session)?;
    if nodes.is_empty() {
        session.out.push_str("No devices found\n");
        return Ok(());
    }
    let is_root = |node: &Node| {
        let before = if style.is_inverted {
            &node.below
        } else {
            &node.above
        };
        before.is_empty()
    };
    let roots = (0..nodes.len()).filter(|index| is_root(&nodes[*index]));
    let mut drawing = Drawing {
        style: &style,
        nodes: &nodes,
        pen: Pen {
            text: String::new(),
            column: 0,
            held: None,
            width: style.width,
        },
        widths: Vec::new(),
        more: Vec::new(),
    };
    drawing.children(&roots.collect::<Vec<_>>(), 0);
    session.out.push_str(&drawing.pen.text);
    Ok(())
}

/// What there is, in the order in which dmsetup comes to it: each device of the list,
/// and before the next one what it stands on.
fn nodes(session: &mut Session<'_>) -> Step<Vec<Node>> {
    let mut nodes: Vec<Node> = Vec::new();
    for one in session.list()? {
        let what = DmDep::Mapped {
            name: one.name,
            major: one.major,
            minor: one.minor,
        };
        add(session, &mut nodes, &what)?;
    }
    Ok(nodes)
}

fn add(session: &mut Session<'_>, nodes: &mut Vec<Node>, what: &DmDep) -> Step<usize> {
    if let Some(index) = nodes.iter().position(|node| node.what == *what) {
        return Ok(index);
    }
    let index = nodes.len();
    nodes.push(Node {
        what: what.clone(),
        info: None,
        below: Vec::new(),
        above: Vec::new(),
    });
    let DmDep::Mapped { name, .. } = what else {
        return Ok(index);
    };
    let device = Device::known(name);
    let order = DmOrder::Deps {
        device: device.name,
        inactive: false,
    };
    let answer = session.order("deps", &device.label, order)?;
    let DmAnswer::Deps { device, deps } = answer else {
        return Err(beside_the_point());
    };
    nodes[index].info = Some(device);
    for dep in deps {
        let below = add(session, nodes, &dep)?;
        nodes[index].below.push(below);
        nodes[below].above.push(index);
    }
    Ok(index)
}

/// Writes, and cuts lines that are too long.
struct Pen {
    text: String,
    /// Letters on this line.
    column: usize,
    /// The letter for the last column, if nothing comes behind it.
    held: Option<char>,
    width: Option<usize>,
}

impl Pen {
    fn write(&mut self, text: &str) {
        for letter in text.chars() {
            self.column += 1;
            match self.width {
                None => self.text.push(letter),
                Some(width) if self.column < width => self.text.push(letter),
                Some(width) if self.column == width => self.held = Some(letter),
                Some(_) if self.held.take().is_some() => self.text.push_str("..."),
                Some(_) => {}
            }
        }
    }

    fn end_line(&mut self) {
        self.text.extend(self.held.take());
        self.text.push('\n');
        self.column = 0;
    }
}

struct Drawing<'a> {
    style: &'a Style,
    nodes: &'a [Node],
    pen: Pen,
    /// For each depth above: columns of its node, in compact drawings.
    widths: Vec<usize>,
    /// For each depth above, and this one: more nodes come there.
    more: Vec<bool>,
}

impl Drawing<'_> {
    fn children(&mut self, indices: &[usize], depth: usize) {
        if depth > DEEPEST {
            return;
        }
        for (place, index) in indices.iter().enumerate() {
            let node = &self.nodes[*index];
            let below = if self.style.is_inverted {
                &node.above
            } else {
                &node.below
            };
            // A node without a name shows only where numbers or block names do.
            let is_named = matches!(node.what, DmDep::Mapped { .. });
            if is_named || self.style.has_numbers || self.style.has_block_names {
                self.more.truncate(depth);
                self.widths.truncate(depth);
                self.more.push(place + 1 < indices.len());
                self.widths.push(0);
                self.node(node, depth, !below.is_empty());
            }
            self.children(below, depth + 1);
        }
    }

    fn node(&mut self, node: &Node, depth: usize, has_children: bool) {
        let is_compact = self.style.is_compact();
        let is_first = self.pen.column == 0;
        if !is_compact || is_first {
            self.indent(depth);
        }
        let from = self.pen.column;
        let lines = self.style.lines;
        if is_compact && !is_first {
            let line = if self.more[depth] {
                lines.first
            } else {
                lines.only
            };
            self.pen.write(line);
        }
        self.label(node);
        if is_compact {
            self.widths[depth] = self.pen.column - from;
        }
        if !is_compact || !has_children {
            self.pen.end_line();
        }
    }

    fn indent(&mut self, depth: usize) {
        let lines = self.style.lines;
        for at in 0..depth {
            self.pen.write(&" ".repeat(self.widths[at] + 1));
            let more = self.more[at + 1];
            self.pen.write(match (at + 1 == depth, more) {
                (true, true) => lines.branch,
                (true, false) => lines.last,
                (false, true) => lines.along,
                (false, false) => "  ",
            });
        }
    }

    fn label(&mut self, node: &Node) {
        let style = self.style;
        if let DmDep::Mapped { name, .. } = &node.what {
            self.pen.write(name);
        }
        let has_table = node
            .info
            .as_ref()
            .is_none_or(|info| info.live_table || info.inactive_table);
        if style.has_block_names && has_table {
            self.pen.write(&format!(" <{}>", block_name(&node.what)));
        }
        if style.has_numbers {
            self.pen.write(&match &node.what {
                DmDep::Mapped { major, minor, .. } | DmDep::Block { major, minor, .. } => {
                    format!(" ({major}:{minor})")
                }
                DmDep::File { path } => format!(" ({})", path.display()),
            });
        }
        if let Some(info) = &node.info {
            self.attributes(info);
        }
    }

    fn attributes(&mut self, info: &DmInfo) {
        let style = self.style;
        let mut attributes = Vec::new();
        if style.is_active {
            attributes.push(
                if info.suspended {
                    "SUSPENDED"
                } else {
                    "ACTIVE"
                }
                .to_owned(),
            );
        }
        if style.has_mode {
            attributes.push(if info.read_only { "RO" } else { "RW" }.to_owned());
        }
        if style.has_open {
            attributes.push(info.open_count.to_string());
        }
        if style.has_uuid {
            attributes.push(info.uuid.clone());
        }
        if !attributes.is_empty() {
            self.pen.write(&format!(" [{}]", attributes.join(", ")));
        }
    }
}
