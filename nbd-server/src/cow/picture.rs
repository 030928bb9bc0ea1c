//! A picture of the origin: cells in rows, each as dark as the share of it that has
//! changed. Decides what is drawn; text, SVG and PNG are three ways to draw it.

use std::fmt::Write;

use nbdsnap_format::ChunkSize;

/// The origin in cells, and how much of each has changed.
#[derive(Clone, Debug)]
pub struct Picture {
    chunk_size: ChunkSize,
    /// Chunks of the origin.
    chunks: u64,
    /// Chunks in a cell, a power of two.
    cell_chunks: u64,
    columns: usize,
    /// Changed chunks in each cell.
    changed: Vec<u64>,
}

/// Levels of darkness, from a trace to all of a cell.
const LEVELS: usize = 8;

/// Cells in which nothing has changed, and the levels: one hue, from light to dark.
const COLOURS: [[u8; 3]; LEVELS + 1] = [
    [0xee, 0xf0, 0xf2],
    [0xc9, 0xdd, 0xf0],
    [0xa5, 0xc8, 0xe6],
    [0x7a, 0xb0, 0xd9],
    [0x53, 0x96, 0xca],
    [0x33, 0x7a, 0xb8],
    [0x1d, 0x5e, 0xa0],
    [0x0f, 0x43, 0x82],
    [0x07, 0x2a, 0x5c],
];

/// Pixels of a cell, with the gap to the next.
const CELL: usize = 8;

impl Picture {
    /// Of an origin of `chunks` chunks, in rows of `columns` cells and at most so many
    /// rows. A cell is a power of two of chunks.
    pub fn new(chunk_size: ChunkSize, chunks: u64, columns: usize, most_rows: usize) -> Self {
        let most = (columns * most_rows) as u64;
        let cell_chunks = chunks.div_ceil(most).next_power_of_two();
        let cells = chunks.div_ceil(cell_chunks) as usize;
        Self {
            chunk_size,
            chunks,
            cell_chunks,
            columns,
            changed: vec![0; cells],
        }
    }

    /// A chunk has changed. One outside the origin is left out.
    pub fn mark(&mut self, chunk: u64) {
        if chunk < self.chunks
            && let Some(cell) = self.changed.get_mut((chunk / self.cell_chunks) as usize)
        {
            *cell += 1;
        }
    }

    /// Bytes in a cell.
    pub fn cell_bytes(&self) -> u64 {
        self.cell_chunks.saturating_mul(self.chunk_size.bytes())
    }

    /// Where a row begins, in bytes.
    fn row_offset(&self, row: usize) -> u64 {
        ((row * self.columns) as u64).saturating_mul(self.cell_bytes())
    }

    /// Of each cell the share that has changed, from 0 to 1.
    pub fn shares(&self) -> impl Iterator<Item = f64> + '_ {
        self.changed.iter().enumerate().map(|(n, changed)| {
            let before = n as u64 * self.cell_chunks;
            let chunks = self.cell_chunks.min(self.chunks - before);
            // Two exceptions for one chunk, in a damaged store.
            (*changed as f64 / chunks as f64).min(1.0)
        })
    }

    /// 0 where nothing has changed, else from 1 to `levels`.
    fn levels(&self, levels: usize) -> Vec<usize> {
        self.shares()
            .map(|share| (share * levels as f64).ceil() as usize)
            .collect()
    }

    /// For a terminal, in block characters; `label` names a row by the byte where it
    /// begins.
    pub fn text(&self, label: impl Fn(u64) -> String) -> String {
        const SHADES: [char; 5] = ['·', '░', '▒', '▓', '█'];
        let mut text = String::new();
        for (row, cells) in self.levels(4).chunks(self.columns).enumerate() {
            let offset = self.row_offset(row);
            let drawn: String = cells.iter().map(|level| SHADES[*level]).collect();
            let _ = writeln!(text, "{:>10}  {drawn}", label(offset));
        }
        text
    }

    /// As an SVG document; `title` and `caption` say what it shows, `label` names a row.
    pub fn svg(&self, title: &str, caption: &str, label: impl Fn(u64) -> String) -> String {
        const LEFT: usize = 90;
        const TOP: usize = 56;
        let rows = self.changed.len().div_ceil(self.columns).max(1);
        let width = LEFT + self.columns * CELL + 16;
        let legend = TOP + rows * CELL + 28;
        let height = legend + 28;
        let mut svg = String::new();
        let _ = write!(
            svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"11\" fill=\"#333\">\n\
             <title>{title}</title>\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n\
             <text x=\"{LEFT}\" y=\"24\" font-size=\"15\" font-weight=\"bold\">{title}</text>\n\
             <text x=\"{LEFT}\" y=\"42\">{caption}</text>\n",
            title = escaped(title),
            caption = escaped(caption),
        );
        // A label is as high as two rows.
        let every = rows.div_ceil(16).next_power_of_two().max(2);
        for (row, cells) in self.levels(LEVELS).chunks(self.columns).enumerate() {
            let y = TOP + row * CELL;
            if row % every == 0 {
                let offset = self.row_offset(row);
                let _ = writeln!(
                    svg,
                    "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
                    LEFT - 8,
                    y + CELL,
                    escaped(&label(offset))
                );
            }
            let mut x = LEFT;
            for same in cells.chunk_by(|a, b| a == b) {
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\" fill=\"{}\"/>",
                    same.len() * CELL - 1,
                    CELL - 1,
                    hex(COLOURS[same[0]])
                );
                x += same.len() * CELL;
            }
        }
        svg_legend(&mut svg, LEFT, legend);
        svg.push_str("</svg>\n");
        svg
    }

    /// As a PNG: only the cells, with `caption` as its description.
    pub fn png(&self, caption: &str) -> Result<Vec<u8>, png::EncodingError> {
        let rows = self.changed.len().div_ceil(self.columns).max(1);
        let (width, height) = (self.columns * CELL, rows * CELL);
        let levels = self.levels(LEVELS);
        // The colour behind the cells comes last.
        let ground = COLOURS.len() as u8;
        let mut pixels = vec![ground; width * height];
        for (n, level) in levels.iter().enumerate() {
            let (x, y) = (n % self.columns * CELL, n / self.columns * CELL);
            for line in y..y + CELL - 1 {
                pixels[line * width + x..][..CELL - 1].fill(*level as u8);
            }
        }
        let mut palette: Vec<u8> = COLOURS.concat();
        palette.extend([0xff; 3]);
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width as u32, height as u32);
        encoder.set_color(png::ColorType::Indexed);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_palette(palette);
        encoder.add_itxt_chunk("Description".into(), caption.into())?;
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&pixels)?;
        writer.finish()?;
        Ok(bytes)
    }
}

fn svg_legend(svg: &mut String, left: usize, y: usize) {
    let mut x = left;
    for (level, colour) in COLOURS.iter().enumerate() {
        let words = match level {
            0 => "unchanged",
            LEVELS => "all changed",
            _ => "",
        };
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{}\" width=\"11\" height=\"11\" fill=\"{}\"/>",
            y - 10,
            hex(*colour)
        );
        x += 14;
        if !words.is_empty() {
            let _ = writeln!(svg, "<text x=\"{}\" y=\"{y}\">{words}</text>", x + 2);
            x += 76;
        }
    }
}

fn hex([r, g, b]: [u8; 3]) -> String {
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// Text between the tags of a document, and in its attributes.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::new();
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            _ => out.push(character),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_as_dark_as_what_has_changed_in_them() {
        let mut picture = Picture::new(ChunkSize::DEFAULT, 18, 4, 2);
        assert_eq!(picture.cell_bytes(), 4 * 16384);
        for chunk in [0, 4, 5, 8, 9, 10, 12, 13, 14, 15, 16, 17, 18, u64::MAX] {
            picture.mark(chunk);
        }
        let shares: Vec<f64> = picture.shares().collect();
        // The last cell has two chunks only.
        assert_eq!(shares, [0.25, 0.5, 0.75, 1.0, 1.0]);
        let text = picture.text(|offset| offset.to_string());
        assert_eq!(text, "         0  ░▒▓█\n    262144  █\n");
    }

    #[test]
    fn the_largest_and_the_smallest_origin_can_be_drawn() {
        for (chunks, cells) in [
            (1, 1),
            (64 * 16, 64 * 16),
            (64 * 16 + 1, 513),
            (u64::MAX, 1024),
        ] {
            let picture = Picture::new(ChunkSize::MIN, chunks, 64, 16);
            assert_eq!(picture.changed.len(), cells, "{chunks}");
            assert!(
                picture
                    .svg("a<b", "&", |_| String::new())
                    .contains("a&lt;b")
            );
            // The last rows begin where no byte is.
            assert!(!picture.text(|offset| offset.to_string()).is_empty());
            assert!(picture.png("").unwrap().starts_with(b"\x89PNG"));
        }
        let nothing = Picture::new(ChunkSize::MIN, 0, 64, 16);
        assert_eq!(nothing.text(|_| String::new()), "");
        assert!(nothing.png("").is_ok());
    }
}
