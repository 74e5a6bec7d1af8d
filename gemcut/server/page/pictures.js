// Pictures on their way from a file to a request.

const TAKEN = new Set(["image/png", "image/jpeg", "image/webp", "image/gif"]);
const MAX_BYTES = 6 * 1024 * 1024;
// 1,120 soft tokens, the most there are, see 2.6 megapixels of a picture: nothing is lost that the model sees
const MAX_SIDE = 4096;

/**
 * A file as the server takes it: as it is, or drawn anew if its format is another or it is very large.
 * Throws an Error that says why it cannot be.
 */
export async function prepare(file) {
  if (TAKEN.has(file.type) && file.size <= MAX_BYTES) return file;
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "The file"} is no picture that this browser can read.`);
  }
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // JPEG has no transparency
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return new Promise((resolve, reject) => {
    canvas.toBlob(
      (blob) => (blob ? resolve(blob) : reject(new Error("The picture is too large for this browser."))),
      "image/jpeg",
      0.95,
    );
  });
}

/** A blob as a data URI. */
export function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

const urls = new Map();

/** An address under which this page shows a picture, the same one as long as the page is open. */
export function pictureUrl(picture) {
  if (!urls.has(picture.id)) urls.set(picture.id, URL.createObjectURL(picture.blob));
  return urls.get(picture.id);
}
