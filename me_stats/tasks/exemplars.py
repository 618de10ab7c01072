"""Worked word problems to stand before a question of GSM8K: written for this package, none from a published prompt."""

from __future__ import annotations

ARITHMETIC = (
    (
        "A tram has 18 passengers. At the market 7 get off and 12 get on. How many passengers does it have then?",
        "After 7 get off, 18 - 7 = 11 passengers are left. With the 12 who get on there are 11 + 12 = 23. The answer "
        "is 23.",
    ),
    (
        "Nora fills 6 jars with 9 plums each and keeps 5 plums to eat. How many plums did she pick?",
        "The jars hold 6 * 9 = 54 plums. Together with the 5 that she keeps she picked 54 + 5 = 59. The answer is 59.",
    ),
    (
        "A rope of 84 metres is cut into pieces of 7 metres. Every third piece is painted red. How many are red?",
        "There are 84 / 7 = 12 pieces. One in three of them is red, which is 12 / 3 = 4. The answer is 4.",
    ),
    (
        "Tickets cost $8 for adults and half of that for children. What do 2 adults and 5 children pay?",
        "A child pays 8 / 2 = 4 dollars. The adults pay 2 * 8 = 16 dollars and the children 5 * 4 = 20 dollars. "
        "Together they pay 16 + 20 = 36 dollars. The answer is 36.",
    ),
    (
        "Ivo reads 25 pages on each of 4 days. His book has 340 pages. How many pages are left?",
        "He has read 25 * 4 = 100 pages. There are 340 - 100 = 240 pages left. The answer is 240.",
    ),
    (
        "A shop lowers the price of a lamp of $60 by 25%, and Mara buys 3. How much does she pay?",
        "25% of 60 is 60 * 0.25 = 15 dollars, so a lamp costs 60 - 15 = 45 dollars. Three of them cost 3 * 45 = 135 "
        "dollars. The answer is 135.",
    ),
    (
        "Two pumps fill a tank of 1,200 litres. One brings 35 litres a minute and the other 25. How many minutes do "
        "they need together?",
        "Together they bring 35 + 25 = 60 litres a minute. They need 1200 / 60 = 20 minutes. The answer is 20.",
    ),
    (
        "Ben is 4 years older than Ada, and Ada is twice as old as Kim, who is 7. How old are the three together?",
        "Ada is 2 * 7 = 14 and Ben is 14 + 4 = 18. Together they are 7 + 14 + 18 = 39. The answer is 39.",
    ),
)
