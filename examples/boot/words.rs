//! QEMU's `first,key=value,flag` words, sizes, and the nearest match to a mistyped one.

/// A comma-separated list of `key=value`, the first of which may stand without its key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Words(Vec<(String, String)>);

impl Words {
    /// Parses `text`; a first word without `=` is the value of `first`. A doubled comma stands for one in a value.
    pub fn parse_type(text: &str, first: &str) -> Result<Self, String> {
        const COMMA: &str = "\u{0}";
        let text = text.replace(",,", COMMA);
        let mut words = Vec::new();
        for (index, word) in text.split(',').enumerate() {
            let word = word.replace(COMMA, ",");
            let (key, value) = match word.split_once('=') {
                Some((key, value)) => (key.to_owned(), value.to_owned()),
                None if index == 0 => (first.to_owned(), word),
                // A word alone switches something on, or with "no" in front off.
                None => (word, "on".to_owned()),
            };
            if key.is_empty() || (index == 0 && value.is_empty()) {
                return Err("a word is missing between commas".into());
            }
            words.push((key, value));
        }
        Ok(Words(words))
    }

    /// The value of a key; the last one counts.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().rev().find(|(known, _)| known == key).map(|(_, value)| value.as_str())
    }

    /// The value of a switch.
    pub fn switch(&self, key: &str, default: bool) -> Result<bool, String> {
        match self.get(key) {
            None => Ok(default),
            Some("on" | "yes" | "true") => Ok(true),
            Some("off" | "no" | "false") => Ok(false),
            Some(other) => Err(format!("{key}={other}: expected on or off")),
        }
    }

    /// The value of a number, decimal or hexadecimal.
    pub fn number(&self, key: &str, default: u64) -> Result<u64, String> {
        let Some(text) = self.get(key) else { return Ok(default) };
        match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => text.parse(),
        }
        .map_err(|_| format!("{key}={text}: expected a number"))
    }

    /// Whether `help` was asked for.
    pub fn wants_help(&self) -> bool {
        self.0
            .iter()
            .any(|(key, value)| key == "help" || key == "?" || value == "help" || value == "?")
    }

    /// Refuses keys that are not among `known`.
    pub fn only(&self, known: &[&str]) -> Result<(), String> {
        for (key, _) in &self.0 {
            if !known.contains(&key.as_str()) {
                return Err(match nearest(key, known.iter().copied()) {
                    Some(near) => format!("there is no '{key}' here. Did you mean '{near}'?"),
                    None => format!("there is no '{key}' here; there is: {}", known.join(", ")),
                });
            }
        }
        Ok(())
    }
}

/// A size in bytes: a number with a suffix K, M, G or T, or else in units of `unit`.
pub fn size(text: &str, unit: u64) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no size: expected a number, and perhaps K, M, G or T");
    let (digits, factor) = match text.char_indices().last() {
        Some((at, 'b' | 'B')) => (&text[..at], 1),
        Some((at, 'k' | 'K')) => (&text[..at], 1 << 10),
        Some((at, 'm' | 'M')) => (&text[..at], 1 << 20),
        Some((at, 'g' | 'G')) => (&text[..at], 1 << 30),
        Some((at, 't' | 'T')) => (&text[..at], 1 << 40),
        _ => (text, unit),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number
        .checked_mul(factor)
        .ok_or_else(|| format!("'{text}' is more than there is address space"))
}

/// The candidate that is the fewest typing errors away, if they are few enough to be some.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (strsim::levenshtein(word, candidate), candidate))
        .min()
        .filter(|(distance, _)| *distance <= 1 + word.chars().count() / 4)
        .map(|(_, candidate)| candidate)
}

/// Breaks a text into lines of at most `width` columns behind `indent` blanks.
pub fn wrap(text: &str, indent: usize, width: usize) -> String {
    let mut wrapped = String::new();
    let mut column = 0;
    for word in text.split_whitespace() {
        if column > 0 && column + 1 + word.chars().count() > width {
            wrapped.push('\n');
            column = 0;
        }
        let lead = if column == 0 { " ".repeat(indent) } else { " ".into() };
        column += lead.len() + word.chars().count();
        wrapped.push_str(&lead);
        wrapped.push_str(word);
    }
    wrapped.push('\n');
    wrapped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_have_an_optional_first_key() {
        let words = Words::parse_type("4,sockets=1,cores=2,threads=2", "cpus").unwrap();
        assert_eq!(words.get("cpus"), Some("4"));
        assert_eq!(words.number("cores", 1), Ok(2));
        assert_eq!(
            Words::parse_type("file,path=a,,b", "backend").unwrap().get("path"),
            Some("a,b")
        );
        assert!(words.only(&["cpus", "sockets", "cores"]).unwrap_err().contains("threads"));
        assert!(Words::parse_type("", "cpus").is_err());
    }

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(size("512", 1 << 20), Ok(512 << 20));
        assert_eq!(size("2G", 1 << 20), Ok(2 << 30));
        assert!(size("2X", 1).is_err());
        assert!(size("", 1).is_err());
        assert!(size("99999999T", 1).is_err());
    }

    #[test]
    fn nearest_is_near() {
        assert_eq!(nearest("kernal", ["kernel", "append"]), Some("kernel"));
        assert_eq!(nearest("xyzzy", ["kernel", "append"]), None);
    }
}
