// Which words of several answers are not in all of them.

const MOST = 1500; // words of one answer that are compared

export const wordsOf = (text) => text.match(/\s+|\S+/g) ?? [];

// The longest common subsequence of two lists, as pairs of indices.
function common(a, b) {
  const n = Math.min(a.length, MOST), m = Math.min(b.length, MOST);
  const length = Array.from({ length: n + 1 }, () => new Uint16Array(m + 1));
  for (let i = n - 1; i >= 0; i--) {
    for (let j = m - 1; j >= 0; j--) {
      length[i][j] = a[i] === b[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
    }
  }
  const pairs = [];
  for (let i = 0, j = 0; i < n && j < m; ) {
    if (a[i] === b[j]) pairs.push([i++, j++]);
    else if (length[i + 1][j] >= length[i][j + 1]) i++;
    else j++;
  }
  return pairs;
}

// Return, for each text, its words as {word, differs}; every text is held against the first.
export function differing(texts) {
  const lists = texts.map((text) => wordsOf(text).filter((w) => w.trim()));
  const shared = lists.map(() => new Set());
  shared[0] = new Set(lists[0].keys());
  lists.slice(1).forEach((list, k) => {
    const inThis = new Set();
    for (const [i, j] of common(lists[0], list)) {
      inThis.add(i);
      shared[k + 1].add(j);
    }
    shared[0] = new Set([...shared[0]].filter((i) => inThis.has(i)));
  });
  return texts.map((text, k) => {
    let index = 0;
    return wordsOf(text).map((word) => ({ word, differs: Boolean(word.trim()) && !shared[k].has(index++) }));
  });
}
