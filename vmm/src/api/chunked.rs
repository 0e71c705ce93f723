//! Bodies that come in chunks (RFC 9112, section 7.1), from bytes that come in pieces. Pure.

use super::http::{MAX_HEAD, Refusal};

/// Longest chunk size, in digits: what a 64-bit number takes.
const MAX_DIGITS: usize = 16;

/// A body that is being put together.
#[derive(Debug)]
pub struct Chunks {
    body: Vec<u8>,
    max_body: usize,
    next: Next,
    /// How many bytes extensions and trailers may still have. They say nothing that is of use here.
    spare: usize,
}

/// What comes next.
#[derive(Clone, Copy, Debug)]
enum Next {
    /// The line that begins a chunk.
    Size,
    /// So many bytes of a chunk.
    Data(usize),
    /// The end of a chunk's last line.
    End,
    /// A line after the last chunk.
    Trailer,
}

impl Chunks {
    /// A body of at most `max_body` bytes, of which nothing has come yet.
    pub fn new(max_body: usize) -> Self {
        Chunks { body: Vec::new(), max_body, next: Next::Size, spare: MAX_HEAD }
    }

    /// Takes what it can use of the start of `bytes`: how many those were, and whether the body is complete now.
    pub fn take(&mut self, bytes: &[u8]) -> Result<(usize, bool), Refusal> {
        let mut used = 0;
        loop {
            let rest = &bytes[used..];
            match self.next {
                Next::Size => {
                    let Some(line) = self.line(rest)? else { return Ok((used, false)) };
                    used += line.len() + 2;
                    self.next = match self.size(line)? {
                        0 => Next::Trailer,
                        size => Next::Data(size),
                    };
                }
                Next::Data(left) => {
                    let here = left.min(rest.len());
                    self.body.extend_from_slice(&rest[..here]);
                    used += here;
                    if here < left {
                        self.next = Next::Data(left - here);
                        return Ok((used, false));
                    }
                    self.next = Next::End;
                }
                Next::End if rest.starts_with(b"\r\n") => {
                    used += 2;
                    self.next = Next::Size;
                }
                Next::End if rest.is_empty() || rest == b"\r" => return Ok((used, false)),
                Next::End => return Err((400, "a chunk is longer than its size".into())),
                Next::Trailer => {
                    let Some(line) = self.line(rest)? else { return Ok((used, false)) };
                    used += line.len() + 2;
                    if line.is_empty() {
                        return Ok((used, true));
                    }
                    self.spend(line.len() + 2)?;
                }
            }
        }
    }

    /// The body, once it is complete.
    pub fn into_body(self) -> Vec<u8> {
        self.body
    }

    /// The line at the start of `bytes`, without its end; `None` if it is not complete.
    fn line<'a>(&self, bytes: &'a [u8]) -> Result<Option<&'a [u8]>, Refusal> {
        let longest = MAX_DIGITS + self.spare + 2;
        match bytes.iter().take(longest).position(|byte| *byte == b'\n') {
            None if bytes.len() >= longest => Err(too_long()),
            None => Ok(None),
            Some(end) => match bytes[..end].strip_suffix(b"\r") {
                // Whoever takes another byte for the end of a line sees another body.
                Some(line) if !line.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t') => Ok(Some(line)),
                _ => Err((400, "a line of a chunked body has a control character or does not end in CRLF".into())),
            },
        }
    }

    /// The size that the first line of a chunk tells.
    fn size(&mut self, line: &[u8]) -> Result<usize, Refusal> {
        let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
        let (number, extension) = line.split_at(digits);
        let size = std::str::from_utf8(number).ok().filter(|_| digits <= MAX_DIGITS);
        let size = size.and_then(|number| u64::from_str_radix(number, 16).ok());
        let extended = extension.trim_ascii_start().starts_with(b";");
        let size = size.filter(|_| extension.is_empty() || extended);
        let size = size.ok_or_else(|| (400, "a chunk does not begin with its size".to_owned()))?;
        self.spend(extension.len())?;
        let room = self.max_body - self.body.len();
        let fits = usize::try_from(size).ok().filter(|size| *size <= room);
        fits.ok_or_else(|| (413, format!("a chunked body of more than {} bytes, which is the limit", self.max_body)))
    }

    fn spend(&mut self, bytes: usize) -> Result<(), Refusal> {
        self.spare = self.spare.checked_sub(bytes).ok_or_else(too_long)?;
        Ok(())
    }
}

fn too_long() -> Refusal {
    (431, format!("the extensions and trailers of a chunked body may have {MAX_HEAD} bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8]) -> Result<Option<Vec<u8>>, u16> {
        let mut chunks = Chunks::new(20);
        match chunks.take(bytes) {
            Ok((_, false)) => Ok(None),
            Ok((used, true)) => {
                assert_eq!(used, bytes.len());
                Ok(Some(chunks.into_body()))
            }
            Err((status, _)) => Err(status),
        }
    }

    #[test]
    fn chunks_make_a_body_and_what_is_no_part_of_it_is_left_out() {
        for bytes in [
            "5\r\nhello\r\n0\r\n\r\n",
            "1\r\nh\r\n00000004\r\nello\r\n000\r\n\r\n",
            "5;a=b;c=\"d\"\r\nhello\r\n0 ; last\r\nX: y\r\nZ:\r\n\r\n",
        ] {
            assert_eq!(decode(bytes.as_bytes()), Ok(Some(b"hello".to_vec())), "{bytes}");
            for cut in 0..bytes.len() {
                assert_eq!(decode(&bytes.as_bytes()[..cut]), Ok(None), "{cut} of {bytes}");
            }
        }
        assert_eq!(decode(b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n").unwrap().unwrap().len(), 20);
    }

    #[test]
    fn what_is_ambiguous_or_too_long_is_refused() {
        for bytes in [
            "\r\n",
            "x\r\n",
            "-1\r\n",
            "+1\r\n",
            "0x1\r\n",
            " 1\r\n",
            "1 \r\n",
            "1 2\r\n",
            "1\n",
            "1\rx\r\n",
            "1;\0\r\n",
            "1\r\nab\r\n",
            "1\r\na\n",
            "0\r\nX: y\n\r\n",
            "00000000000000001\r\n",
        ] {
            assert_eq!(decode(bytes.as_bytes()), Err(400), "{bytes:?}");
        }
        for bytes in ["15\r\n", "b\r\n01234567890\r\nb\r\n", "ffffffffffffffff\r\n"] {
            assert_eq!(decode(bytes.as_bytes()), Err(413), "{bytes:?}");
        }
        let long = "x".repeat(MAX_HEAD + MAX_DIGITS);
        let many = "1;xxxxxxxx\r\na\r\n".repeat(19);
        for bytes in
            [format!("1;{long}"), format!("1;{long}\r\n"), format!("0\r\n{long}\r\n"), format!("0\r\n{many}{long}")]
        {
            assert_eq!(decode(bytes.as_bytes()), Err(431));
        }
    }
}
